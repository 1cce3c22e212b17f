"""Local: every client on its own."""

from braidlora.federated.protocol.rules.spec import RuleSpec

# Clients train A and B on their own data and send nothing: the reference that sharing is measured against.
SPEC = RuleSpec(
    name="local",
    label="Local",
    uploads=(),
    downloads=(),
    ranks="any",
    one_scaling=False,
    robust=False,
    no_privacy="nothing travels, so there is nothing to protect",
)
