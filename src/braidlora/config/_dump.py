"""Write plain data as YAML that readers of YAML 1.1 and 1.2 parse to the same values."""

from __future__ import annotations

import io
import re
from typing import Any

from braidlora.config._scalars import kind_of

# What YAML 1.1 reads as a number, date, boolean or merge, although YAML 1.2 may not.
_OLD_SCALAR = re.compile(r"[-+.=<]?[-+.0-9:]|[<=]|(y|n|yes|no|on|off|true|false|null)$", re.IGNORECASE)


def dump_yaml(data: Any) -> str:
    """`data` (mappings, lists and scalars) as block-style YAML with keys in order; `parse_scalar` reads it back."""
    from ruamel.yaml import YAML
    from ruamel.yaml.representer import SafeRepresenter

    class Representer(SafeRepresenter):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(representer: Any, value: str) -> Any:
        style = "'" if kind_of(value) != "str" or _OLD_SCALAR.match(value) else None
        if not value.isprintable() and not value.replace("\n", "").isprintable():
            style = '"'
        return representer.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    def number(representer: Any, value: float) -> Any:
        written = {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}.get(repr(value), repr(value))
        if "e" in written and "." not in written:  # YAML 1.1 reads 1e-05 as text
            written = written.replace("e", ".0e")
        return representer.represent_scalar("tag:yaml.org,2002:float", written)

    Representer.add_representer(str, text)
    Representer.add_representer(float, number)
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.allow_unicode = True
    yaml.width = 2**20  # no folding of long strings
    stream = io.StringIO()
    yaml.dump(data, stream)
    return stream.getvalue()
