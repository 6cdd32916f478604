"""The models behind the embedded gateway: scripted, local, or another provider's."""
