"""The patterns that come with the gateway, by name, in two sets: `pii` and `secrets`. Data; each says its source."""

from __future__ import annotations

from typing import Final

from gateway_client.gateways.guardrails import checks
from gateway_client.gateways.guardrails.pattern import Pattern

_URL_SAFE: Final = "A-Za-z0-9_-"
_PEM: Final = "[A-Za-z0-9+/=\\\\\\s:,.-]"  # `\\n` too: PEM inside JSON text inside JSON text
_PEM_CLOSE: Final = "[A-Za-z0-9+/=\\\\\\r\\n]"
_DIGITS: Final = "0-9A-Za-z_-"

PII: Final = (
    # RFC 5322 §3.4.1 as it is written in practice: no quoted local part, a top-level domain of letters.
    Pattern("email", r"[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9.-]{1,189}\.[A-Za-z]{2,24}", edge="A-Za-z0-9"),
    # ITU-T E.164 with its plus sign; and the North American form with brackets.
    Pattern("phone", r"\+[1-9][0-9 ().-]{6,20}[0-9]", check=checks.phone),
    Pattern("phone", r"\([2-9]\d{2}\) ?[2-9]\d{2}-\d{4}"),
    Pattern("card", r"\d{4}[ -]?\d{4}[ -]?\d{4}[ -]?\d{4}", edge=_DIGITS, never_before=".", check=checks.card),
    Pattern("card", r"3[47]\d{2}[ -]?\d{6}[ -]?\d{5}", edge=_DIGITS, never_before=".", check=checks.card),
    Pattern("card", r"3[068]\d{2}[ -]?\d{6}[ -]?\d{4}", edge=_DIGITS, never_before=".", check=checks.card),
    Pattern("iban", r"[A-Z]{2}\d{2}[A-Z0-9 ]{11,38}", check=checks.iban),
    Pattern("us_ssn", r"\d{3}-\d{2}-\d{4}", edge=_DIGITS, check=checks.us_ssn),
    Pattern("es_dni", r"[0-9XYZ]\d{7}[A-Z]", check=checks.es_dni),
    Pattern("fr_nir", r"[12] ?\d{2} ?\d{2} ?\d[0-9AB] ?\d{3} ?\d{3} ?\d{2}", edge=_DIGITS, check=checks.fr_nir),
    Pattern("it_cf", r"[A-Z]{6}[0-9L-NP-V]{2}[A-EHLMPR-T][0-9L-NP-V]{2}[A-Z][0-9L-NP-V]{3}[A-Z]", check=checks.it_cf),
    Pattern("br_cpf", r"\d{3}\.\d{3}\.\d{3}-\d{2}", edge=_DIGITS, check=checks.br_cpf),
)

SECRETS: Final = (
    # RFC 7468 (PKIX, PKCS #8), RFC 1421 (with headers), OpenSSH's PROTOCOL.key; the second for one that is cut short.
    Pattern(
        "private_key",
        rf"-----BEGIN [A-Z0-9 ]{{0,32}}PRIVATE KEY-----{_PEM}{{16,16384}}-----END [A-Z0-9 ]{{0,32}}PRIVATE KEY-----",
        edge="",
    ),
    Pattern(
        "private_key",
        rf"-----BEGIN [A-Z0-9 ]{{0,32}}PRIVATE KEY-----{_PEM_CLOSE}{{16,8192}}",
        edge="",
        check=checks.cut_pem,
    ),
    # RFC 7519 and RFC 7515 §3.1: header and payload are objects, so both begin with {" in base64url.
    Pattern(
        "jwt", rf"eyJ[{_URL_SAFE}]{{8,2048}}\.eyJ[{_URL_SAFE}]{{8,8192}}\.[{_URL_SAFE}]{{16,1024}}", edge=_URL_SAFE
    ),
    # AWS, IAM user guide, "Unique identifiers": AKIA long-term, ASIA temporary; base32.
    Pattern("aws_key", r"A[KS]IA[A-Z2-7]{16}"),
    # The same guide's credentials file: a secret has no shape of its own, so its name must stand before it.
    Pattern("aws_key", r"aws_secret_access_key[ =:]{1,4}[A-Za-z0-9/+]{40}", edge="A-Za-z0-9/+"),
    # GitHub, "Behind GitHub's new authentication token formats" and "About authentication to GitHub".
    Pattern("github_token", r"gh[pousr]_[A-Za-z0-9]{36,251}"),
    Pattern("github_token", r"github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}"),
    # GitLab, "Token overview", token prefixes.
    Pattern("gitlab_token", r"gl[a-z]{2,5}-[A-Za-z0-9_-]{20,255}", edge=_URL_SAFE),
    # Slack, "Tokens": bot, user, app-level, refresh.
    Pattern("slack_token", r"xox[abeoprs]-[A-Za-z0-9-]{20,250}", edge=_URL_SAFE),
    Pattern("slack_token", r"xapp-\d-[A-Za-z0-9-]{20,250}", edge=_URL_SAFE),
    # Google Cloud, "Manage API keys".
    Pattern("google_key", r"AIza[A-Za-z0-9_-]{35}", edge=_URL_SAFE),
    # Stripe, "API keys": secret and restricted, live mode.
    Pattern("stripe_key", r"[rs]k_live_[A-Za-z0-9]{16,247}"),
    # OpenAI and Anthropic: keys of projects, service accounts, administrators.
    Pattern("openai_key", r"sk-proj-[A-Za-z0-9_-]{32,250}", edge=_URL_SAFE),
    Pattern("openai_key", r"sk-svcacct-[A-Za-z0-9_-]{32,250}", edge=_URL_SAFE),
    Pattern("openai_key", r"sk-[A-Za-z0-9]{20}T3BlbkFJ[A-Za-z0-9]{20}", edge=_URL_SAFE),
    Pattern("anthropic_key", r"sk-ant-[a-z0-9]{3,10}-[A-Za-z0-9_-]{32,250}", edge=_URL_SAFE),
    # npm, "New access token format"; PyPI, "Token scanning" (a macaroon); Hugging Face, "User access tokens".
    Pattern("npm_token", r"npm_[A-Za-z0-9]{36}"),
    Pattern("pypi_token", r"pypi-AgEIcHlwaS5vcmc[A-Za-z0-9_-]{50,1024}", edge=_URL_SAFE),
    Pattern("huggingface_token", r"hf_[A-Za-z0-9]{34,40}"),
    # SendGrid, "API keys"; DigitalOcean, "Token formats".
    Pattern("sendgrid_key", r"SG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}", edge=_URL_SAFE),
    Pattern("digitalocean_token", r"do[opr]_v1_[a-f0-9]{64}"),
)

SETS: Final[dict[str, tuple[Pattern, ...]]] = {"pii": PII, "secrets": SECRETS}
BY_NAME: Final[dict[str, tuple[Pattern, ...]]] = {
    name: tuple(pattern for pattern in (*PII, *SECRETS) if pattern.name == name)
    for name in dict.fromkeys(pattern.name for pattern in (*PII, *SECRETS))
}


def named(name: str) -> tuple[Pattern, ...]:
    """Return the patterns of a set or of one name; raises LookupError naming the known ones."""
    found = SETS.get(name) or BY_NAME.get(name)
    if found is None:
        raise LookupError(f"cannot find pattern {name!r}: known are {', '.join((*SETS, *BY_NAME))}")
    return found
