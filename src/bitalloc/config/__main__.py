"""Write config.yaml and schema.json into the folder that is named, or into config/."""

import sys
from pathlib import Path

from bitalloc.config.render import default_yaml, schema_json

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "config")
(folder / "config.yaml").write_text(default_yaml(), encoding="utf-8")
(folder / "schema.json").write_text(schema_json(), encoding="utf-8")
