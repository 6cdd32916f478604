"""An agent's own certificate authority: its key from a secret of the daemon and a name, its certificate from the key.

So nothing has to be kept for each agent but the name, and a daemon that comes back has the same authority again.
"""

from __future__ import annotations

import datetime as dt
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from gateway_client.egress.messages import Authority

SECRET_BYTES: Final = 32
authority_seconds: Final = 366 * 86_400
CLOCK_SLACK: Final = dt.timedelta(hours=1)

# The order of the group of P-256 (SEC 2 section 2.4.2). Eight bytes more than it has are reduced, so that no key is
# likelier than another (FIPS 186-5 appendix A.2.1).
_ORDER: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_KEY_BYTES: Final = 40
_PURPOSE: Final = b"stockade agent authority v1 "


def make_authority(secret: bytes, name: str, *, since: dt.datetime) -> Authority:
    """Give the authority of this name: the same key for the same secret, and a certificate that begins at `since`."""
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"cannot make authority: the secret is not of {SECRET_BYTES} bytes")
    material = HKDF(algorithm=hashes.SHA256(), length=_KEY_BYTES, salt=None, info=_PURPOSE + name.encode()).derive(
        secret
    )
    key = ec.derive_private_key(int.from_bytes(material, "big") % (_ORDER - 1) + 1, ec.SECP256R1())
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Stockade"),
            x509.NameAttribute(NameOID.COMMON_NAME, f"Stockade agent authority {name}"),
        ]
    )
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(since - CLOCK_SLACK)
        .not_valid_after(since + dt.timedelta(seconds=authority_seconds))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Authority(
        certificate.public_bytes(serialization.Encoding.PEM).decode("ascii"),
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode("ascii"),
    )
