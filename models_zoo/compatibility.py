"""Make folders that transformers 5 writes readable for programs that expect those of version 4."""

import json
from pathlib import Path


def add_rope_theta(folder: Path) -> None:
    """Give `config.json` the top-level `rope_theta` that was used before `rope_parameters`."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if "rope_theta" not in config and "rope_parameters" in config:
        config["rope_theta"] = config["rope_parameters"]["rope_theta"]
        _write(path, config)


def use_plain_tokenizer_class(folder: Path) -> None:
    """Have `tokenizer_config.json` name the class that every version knows for a `tokenizer.json`."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # How this process happened to load the tokenizer is no property of it.
    for key in ("backend", "is_local", "local_files_only"):
        config.pop(key, None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    _write(path, config)


def _write(path: Path, config: dict[str, object]) -> None:
    path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
