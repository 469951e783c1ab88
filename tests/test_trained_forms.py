"""What trainers write: `seechat info` says a command that works, or why there is none."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reference import data, random_array
from seechat_export.export import export_bundle
from seechat_lite.cli.main import main
from seechat_weights.files.checkpoint import open_checkpoint
from seechat_weights.lm.checkpoint import open_lm

State = dict[str, torch.Tensor]


def state() -> State:
    return load_file(data("chatglm_tiny/model.safetensors"))


def settled(folder: Path) -> Path:
    """A folder with the configuration and the tokenizer, and no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "ice_text.model"):
        shutil.copyfile(data(f"chatglm_tiny/{name}"), folder / name)
    return folder


def beside(folder: Path) -> None:
    """What a trainer keeps to go on."""
    torch.save({"state": {0: torch.ones(9)}, "param_groups": []}, folder / "optimizer.pt")
    torch.save({"last_epoch": 3}, folder / "scheduler.pt")
    torch.save({"cpu": torch.ones(9)}, folder / "rng_state_0.pth")
    (folder / "training_args.bin").write_bytes(b"PK\3\4")
    (folder / "trainer_state.json").write_text("{}")


def deepspeed(folder: Path) -> Path:
    step = settled(folder / "checkpoint-3000") / "global_step3000"
    step.mkdir()
    torch.save({"module": state(), "ds_version": "0.9.5"}, step / "mp_rank_00_model_states.pt")
    (step.parent / "latest").write_text("global_step3000")
    beside(step.parent)
    return step.parent


def deepspeed_step(folder: Path) -> Path:
    return deepspeed(folder) / "global_step3000"


def deepspeed_file(folder: Path) -> Path:
    return deepspeed_step(folder) / "mp_rank_00_model_states.pt"


def two_steps(folder: Path) -> Path:
    path = deepspeed(folder)
    shutil.copytree(path / "global_step3000", path / "global_step2000")
    return path


def step_of_a_base(folder: Path) -> Path:
    """checkpoint-N of a run in the base's own folder, which has the configuration."""
    step = settled(folder / "chatglm-6b") / "checkpoint-100"
    step.mkdir()
    torch.save(state(), step / "pytorch_model.bin")
    beside(step)
    return step


def tokenizer_above(folder: Path) -> Path:
    step = step_of_a_base(folder)
    shutil.copy(step.parent / "config.json", step)
    return step


def lightning(folder: Path) -> Path:
    names = {f"model.{k}": v for k, v in state().items()}
    content = {"state_dict": names, "epoch": 3, "pytorch-lightning_version": "2.0"}
    torch.save(content, settled(folder / "run") / "epoch=3-step=100.ckpt")
    return folder / "run"


def wrapped(folder: Path) -> Path:
    torch.save({"model_state_dict": state(), "epoch": 3}, settled(folder / "run") / "last.pth")
    beside(folder / "run")
    return folder / "run"


def compiled(folder: Path) -> Path:
    names = {f"module._orig_mod.{k}": v for k, v in state().items()}
    torch.save({"model": names}, settled(folder / "run") / "pytorch_model.bin")
    return folder / "run"


def one_file(folder: Path) -> Path:
    return wrapped(folder) / "last.pth"


def adapter(folder: Path, name: str, extra: State | None = None) -> Path:
    folder.mkdir(parents=True)
    key = "base_model.model.transformer.layers.%d.attention.query_key_value.lora_%s.weight"
    tensors = extra or {}
    for i in range(3):
        for part, shape in (("A", (4, 64)), ("B", (192, 4))):
            tensors[key % (i, part)] = torch.from_numpy(random_array(*shape)) * 0.05
    if name.endswith("safetensors"):
        save_file(tensors, folder / name)
    else:
        torch.save(tensors, folder / name)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["query_key_value"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def lora(name: str, *, file: bool = False) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = adapter(folder / "lora", name)
        beside(path)
        return path / name if file else path

    write.__name__ = f"{name}{' itself' * file}"
    return write


def lora_with_a_module(folder: Path) -> Path:
    key = "base_model.model.lm_head.modules_to_save.weight"
    return adapter(folder / "lora", "adapter_model.bin", {key: state()["lm_head.weight"]})


def ptuning(folder: Path) -> Path:
    (folder / "run").mkdir(parents=True)
    prefix = {"transformer.prefix_encoder.embedding.weight": torch.from_numpy(random_array(8, 384))}
    torch.save(prefix, folder / "run/pytorch_model.bin")
    beside(folder / "run")
    return folder / "run"


WORK = [
    deepspeed, deepspeed_step, deepspeed_file, two_steps, step_of_a_base, tokenizer_above,
    lightning, wrapped, compiled, one_file, lora("adapter_model.safetensors"),
    lora("pytorch_model.bin"), lora("chatglm-lora.pt"), lora("chatglm-lora.pt", file=True),
    lora("model.safetensors"), lora_with_a_module, ptuning,
]  # fmt: skip


def said(path: Path, capfd: pytest.CaptureFixture[str]) -> tuple[int, dict[str, object], str]:
    """What `seechat info --json` returns and prints, and its error."""
    capfd.readouterr()
    code = main(["info", str(path), "--json"])
    out, error = capfd.readouterr()
    return code, json.loads(out) if out else {}, error


@pytest.mark.parametrize("form", WORK, ids=lambda form: form.__name__)
def test_its_command_works(
    form: Callable[[Path], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = form(tmp_path)
    code, found, _ = said(path, capfd)
    assert code == 0 and found["usable"], found
    base = shutil.copytree(data("chatglm_tiny"), tmp_path / "base")
    _, *command = shlex.split(str(found["command"]))
    command = [{"CHATGLM-6B": str(base), "BUNDLE": str(tmp_path / "b")}.get(w, w) for w in command]
    code = main(command)
    assert code == 0, (command, capfd.readouterr().err)
    if found["kind"] == "chatglm":
        assert set(found["missing"]) == set()
        plain, opened = open_lm(data("chatglm_tiny")), open_lm(path)
        assert all((opened.read(k) == plain.read(k)).all() for k in plain.shapes)


def zero3(folder: Path) -> Path:
    path = deepspeed(folder)
    (path / "global_step3000/mp_rank_00_model_states.pt").unlink()
    (path / "global_step3000/zero_pp_rank_0_mp_rank_00_model_states.pt").touch()
    return path


def fsdp(folder: Path) -> Path:
    path = settled(folder / "run")
    (path / "pytorch_model_fsdp_0").mkdir()
    (path / "pytorch_model_fsdp_0/__0_0.distcp").touch()
    return path


def parallel(folder: Path) -> Path:
    path = deepspeed(folder)
    (path / "global_step3000/mp_rank_01_model_states.pt").touch()
    return path


def missing_layers(folder: Path) -> Path:
    path = settled(folder / "run")
    save_file({k: v for k, v in state().items() if ".2." not in k}, path / "model.safetensors")
    return path


def another_shape(folder: Path) -> Path:
    path = settled(folder / "run")
    save_file(state() | {"lm_head.weight": torch.ones(9, 64)}, path / "model.safetensors")
    return path


def one_more(folder: Path) -> Path:
    path = settled(folder / "run")
    save_file(state() | {"transformer.x": torch.ones(9)}, path / "model.safetensors")
    return path


def several(folder: Path) -> Path:
    path = settled(folder / "run")
    for name in ("epoch1.pth", "epoch2.pth"):
        torch.save(state(), path / name)
    return path


def nothing_learned(folder: Path) -> Path:
    path = adapter(folder / "lora", "pytorch_model.bin")
    tensors = torch.load(path / "pytorch_model.bin")
    zeros = {k: v * 0 if "lora_B" in k else v for k, v in tensors.items()}
    torch.save(zeros, path / "pytorch_model.bin")
    return path


def dora(folder: Path) -> Path:
    path = adapter(folder / "lora", "adapter_model.bin")
    settings = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(settings | {"use_dora": True}))
    return path


REFUSED = {
    zero3: "zero_to_fp32.py",
    fsdp: "dcp_to_torch_save",
    parallel: "split over several files",
    missing_layers: "12 missing",
    another_shape: "lm_head.weight is [9, 64]",
    one_more: "1 not known (transformer.x)",
    several: "holds 2 files of weights",
    nothing_learned: "changes nothing",
    dora: "use_dora",
}


@pytest.mark.parametrize(
    ("form", "reason"), REFUSED.items(), ids=lambda v: getattr(v, "__name__", "")
)
def test_it_says_why_there_is_no_command(
    form: Callable[[Path], Path], reason: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The very words of the export."""
    path = form(tmp_path)
    code, found, error = said(path, capfd)
    assert code == 1 and not found.get("command") and not found.get("run")
    why = error or " ".join(map(str, dict(found["facts"]).values()))  # type: ignore[call-overload]
    assert reason in why
    given = {"lm": data("chatglm_tiny"), "adapter": path}
    with pytest.raises(Exception, match="expected") as e:
        export_bundle(**({"lm": path} if "lora" not in path.name else given), out=tmp_path / "b")
    assert reason in str(e.value)


# what docs/checkpoints.md calls each form
ROWS = {
    "deepspeed": "`checkpoint-N` with `global_stepN/mp_rank_00_model_states.pt`",
    "deepspeed_step": "also that folder or file itself",
    "deepspeed_file": "also that folder or file itself",
    "two_steps": "the step that `latest` names",
    "step_of_a_base": "whose `config.json` or `ice_text.model` lies in the folder above",
    "tokenizer_above": "whose `config.json` or `ice_text.model` lies in the folder above",
    "lightning": "Lightning: a `.ckpt`",
    "wrapped": "`model_state_dict`",
    "compiled": "`_orig_mod.`",
    "one_file": "`--lm DIR` or the file",
    "adapter_model.safetensors": "`adapter_model.*`",
    "pytorch_model.bin": "A PEFT LoRA saved as `adapter_model.*`, `pytorch_model.bin`",
    "chatglm-lora.pt": "a single file of any name, beside `adapter_config.json`",
    "chatglm-lora.pt itself": "`--lm BASE --adapter PATH`",
    "model.safetensors": "`model.safetensors` or a single file",
    "lora_with_a_module": "`modules_to_save`",
    "ptuning": "P-tuning's `prefix_encoder` in `pytorch_model.bin`",
    "zero3": "`zero_pp_rank_*`",
    "fsdp": "`*.distcp`",
    "parallel": "several `mp_rank_*` files",
    "missing_layers": "layers that are missing",
    "another_shape": "tensors of another shape",
    "one_more": "without a place",
    "several": "several files of weights in one folder",
    "nothing_learned": "an adapter or prefix of zeros",
    "dora": "DoRA",
}


def test_the_documentation_has_every_form() -> None:
    assert set(ROWS) == {form.__name__ for form in (*WORK, *REFUSED)}
    text = (Path(__file__).parent.parent / "docs/checkpoints.md").read_text("utf-8")
    assert not [form for form, words in ROWS.items() if words not in text]


def test_names_of_other_families_stay(tmp_path: Path) -> None:
    """A model that all names begin with is not this family's wrapping."""
    names = {"model.layers.0.x": torch.ones(2), "model.norm.weight": torch.ones(2)}
    torch.save(names, tmp_path / "a.bin")
    assert set(open_checkpoint(tmp_path / "a.bin").shapes) == set(names)
