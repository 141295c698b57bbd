"""Sharing a model: folders for the Hugging Face Hub, uploads and downloads.

    from tools import hub
    model = hub.load("hf://user/name")        # or a folder of save(), or a run's checkpoint folder

A folder holds model.safetensors, config.json with every field of the Config, and a model card. huggingface_hub comes
with datasets and is imported only here. """

import dataclasses
import importlib
import json
import re
import tempfile
from pathlib import Path

import torch

import checkpoint
import model
import tokenizer
from cli import UserError
from data import TOKENIZER, stored_name
from logger import is_run, read_json
from terminal import say
from tools.network import hub_answers

HUB = "hf://"  # prefix of a repository's name, where a folder could stand as well
MODEL_TYPE = "modded-nanomoe"  # in config.json
RUN_SECTION = "\n## The run\n"  # heading of a model card's part about the run
CARD = """---
library_name: modded-nanomoe
license: mit
pipeline_tag: text-generation
tags:
- moe
---

# {title}

A language model of modded-nanomoe: {kind}, {total:,} parameters, {active:,} of them active per token.
Tokens: encoding `{encoding}`, {vocab_size:,} ids. Trained with windows of up to {window_size:,} tokens.

```python
from tokenizer import get_encoding
from tools import hub

model = hub.load("{where}")
encoding = get_encoding(model.encoding)
```

`python model.py --checkpoint {where} --prompt "..."` continues a text. This is a small model of a speedrun: it imitates
its corpus, and its statements need not be true.
{about_run}"""


def load(where: str | Path, device: str = "cpu", **kwargs) -> model.GPT:
    """The trained model in evaluation mode, with its `encoding`: of a run's folder or the checkpoint folder in it, a
    folder of save(), or hf://user/name.

    kwargs are those of huggingface_hub.hf_hub_download, such as revision or token. Raises UserError."""
    if not is_shared(where):
        return checkpoint.load_model_from_run(checkpoint_folder(Path(where)), device)[0]
    mend = "write it again"
    if str(where).startswith(HUB):
        hub_answers()
        mend = "check its name, your connection, and `hf auth login` if it is private"
    _, safetensors = import_hub()
    try:
        settings = json.loads(fetch(where, "config.json", **kwargs).read_text())
        net = model.build(checkpoint.config_of({"model": config_fields(settings)} | settings))
        state = safetensors.load_file(fetch(where, "model.safetensors", **kwargs))
        state |= {"head": state["embed"]} if net.config.tie_embeddings else {}  # the file holds a shared tensor once
        net.load_state_dict(checkpoint.with_current_names(state, net.state_dict()))
        net.encoding = settings["encoding"]
        if net.encoding == TOKENIZER:
            net.encoding = str(fetch(where, TOKENIZER, **kwargs))
    except UserError:
        raise
    except Exception as error:  # of the network, the Hub, safetensors, or a foreign configuration
        raise UserError(f"{where} cannot be loaded ({first_line(error)}); {mend}") from error
    return net.to(device).eval()


def is_shared(where: str | Path) -> bool:
    """Whether a model lies on the Hub, or in a folder of save()."""
    return str(where).startswith(HUB) or (Path(where) / "model.safetensors").exists()


def fetch(where: str | Path, file: str, **kwargs) -> Path:
    """A file of a shared model, downloaded from the Hub unless it is there. kwargs are those of load()."""
    if not str(where).startswith(HUB):
        return Path(where) / file
    return Path(import_hub()[0].hf_hub_download(str(where).removeprefix(HUB), file, **kwargs))


def checkpoint_folder(folder: Path) -> Path:
    """The folder of a run's checkpoints, given that or the run's. Raises UserError if there is no checkpoint."""
    inside = folder / "checkpoint"
    found = inside if not checkpoint.checkpoints(folder) and inside.is_dir() else folder
    if not checkpoint.checkpoints(found):
        beside = filter(checkpoint.checkpoints, sorted(folder.absolute().parent.glob("*/checkpoint")))
        names = ", ".join(path.parent.name for path in beside)
        mend = f"runs beside it that do: {names}" if names else "train first, or name another folder"
        raise UserError(f"{folder} holds no checkpoint; {mend}")
    return found


def config_fields(settings: dict) -> dict:
    """Fields of the Config in a config.json of earlier versions, which had them beside the other entries."""
    return {name: value for name, value in settings.items() if name not in ("encoding", "model_type", "config_class")}


def save(
    net: model.GPT, folder: str | Path, about_run: str = "", pictures: dict[str, bytes] | None = None, where: str = ""
):
    """Write model.safetensors, config.json, its tokenizer.json if it has one, a model card ending in `about_run`, and
    pictures.

    `where` is the address in the card's example, by default the folder."""
    _, safetensors = import_hub()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.save_model(net, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {"model_type": MODEL_TYPE, "encoding": stored_name(net.encoding),
                "config_class": checkpoint.class_name(net.config), "model": dataclasses.asdict(net.config)}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "README.md").write_text(model_card(net, where or str(folder), about_run), encoding="utf-8")
    if settings["encoding"] == TOKENIZER:
        for name, text in tokenizer.files(net.encoding).items():
            (folder / name).write_text(text, encoding="utf-8")
    for name, content in (pictures or {}).items():
        (folder / name).write_bytes(content)


def model_card(net: model.GPT, where: str, about_run: str) -> str:
    config, counts = net.config, model.count_parameters(net.config)
    kind = f"{config.n_layer} dense layers"
    if config.num_moe_layers:
        layers = f"in {config.num_moe_layers} of {config.n_layer} layers"
        kind = f"{config.num_experts} experts, top-{config.top_k}, {layers}"
    facts = dict(title=where.rpartition("/")[2], where=where, kind=kind, encoding=stored_name(net.encoding))
    sizes = dict(vocab_size=config.vocab_size, window_size=config.window_size)
    return CARD.format(**facts, **sizes, about_run=about_run, total=counts["total"], active=counts["active"])


def push(net: model.GPT, repo_id: str, about_run: str = "", pictures: dict[str, bytes] | None = None) -> str:
    """Upload the files of save() to a repository on the Hub, created if it does not exist; returns the commit's
    address.

    Raises UserError."""
    mend = "log in with `hf auth login`, or write a folder with --save_pretrained"
    if not hub_answers():
        raise UserError(f"{repo_id} cannot be uploaded (the Hub does not answer); check your connection, or {mend}")
    hub, _ = import_hub()
    try:
        with tempfile.TemporaryDirectory() as folder:
            save(net, folder, about_run, pictures, where=HUB + repo_id)
            hub.create_repo(repo_id, exist_ok=True)
            return hub.upload_folder(repo_id=repo_id, folder_path=folder).commit_url
    except Exception as error:  # of the network or the Hub
        raise UserError(f"{repo_id} cannot be uploaded ({first_line(error)}); {mend}") from error


def share(where: str | Path, folder: Path | None, repo_id: str | None):
    """Write a checkpoint as the Hub's files into a folder, or upload it. In a folder that exists only these files are
    replaced. Raises UserError where other files are in the way."""
    if folder and not may_hold_model(folder):
        raise UserError(f"{folder} already holds other files; name a new folder")
    net, about = load(where), run_card(where)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as partial:  # on the same disk
            save(net, partial, *about, where=str(folder))
            written = [path.replace(folder / path.name) for path in sorted(Path(partial).iterdir())]
        print(f"{folder}: " + ", ".join(f"{path.name} ({path.stat().st_size:,} bytes)" for path in written))
    if repo_id:
        print(push(net, repo_id, *about))


def may_hold_model(folder: Path) -> bool:
    """Whether a folder is new, empty but for hidden files such as .git, or holds a model of this project."""
    if not folder.exists() or (folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir())):
        return True
    config = folder / "config.json"
    return config.exists() and read_json(config).get("model_type") == MODEL_TYPE


def run_card(where: str | Path) -> tuple[str, dict[str, bytes]]:
    """The part of a model card about the run of a checkpoint folder, or that of a shared model's card, and its
    pictures; empty without a run."""
    from tools import report

    if is_shared(where):
        try:
            _, mark, section = fetch(where, "README.md").read_text(encoding="utf-8").partition(RUN_SECTION)
            pictures = re.findall(r"!\[[^]]*\]\(([\w.-]+\.png)\)", section)
            return mark + section, {name: fetch(where, name).read_bytes() for name in pictures}
        except Exception as error:  # of the disk, the network or the Hub
            say(f"note: the card of {where} cannot be read ({first_line(error)}); the new one is without its run")
            return "", {}
    run = checkpoint.latest_checkpoint(checkpoint_folder(Path(where))).parent.parent
    return report.make_card_section(run) if is_run(run) else ("", {})


def import_hub():
    """(huggingface_hub, safetensors.torch). Raises UserError if they are missing."""
    try:
        return importlib.import_module("huggingface_hub"), importlib.import_module("safetensors.torch")
    except ImportError:
        mend = "`pip install huggingface_hub safetensors`"
        raise UserError(f"the Hub's folders need huggingface_hub and safetensors: {mend}") from None


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def for_inference(net: model.GPT) -> model.GPT:
    """The model with its matrices in the dtype of activations: cast once, to the same bits, in half the memory.

    It can no longer be trained or saved."""
    for name, parameter in net.named_parameters():
        if model.parameter_rule(name).kind in ("matrix", "expert", "head"):
            parameter.data = parameter.data.to(model.DTYPES[net.config.dtype])
    return net


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
