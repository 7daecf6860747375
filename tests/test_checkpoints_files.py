"""Files: nothing in them is run, whatever else is in them survives, and they are whole at every moment."""

import json
import os
import signal
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from test_checkpoints import in_form
from weightnorm import convert_state_dict
from weightnorm.checkpoints import files
from weightnorm.checkpoints.command import convert_file
from weightnorm.errors import UserError


def generator(spelling="gv"):
    """HiFi-GAN's shapes, scaled down."""
    layers = [nn.Conv1d(8, 16, 7), nn.ConvTranspose1d(16, 8, 16, 8), nn.Conv1d(8, 1, 7)]
    return nn.Sequential(*(in_form(spelling, layer) for layer in layers))


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def load(path):
    return torch.load(path, weights_only=True)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["net.pt", "net.pth", "net.bin", "net.ckpt", "g_02500000", "net.safetensors"])
@pytest.mark.parametrize("place", ["beside", "in place"])
def test_a_file_is_converted_in_its_own_format(name, place, tmp_path, capsys):
    net = generator()
    source, out = tmp_path / name, tmp_path / (name if place == "in place" else f"new_{name}")
    files.write(source, files.File(net.state_dict()))
    convert_file(source, out, "original")
    assert capsys.readouterr().out == f"3 weights: gv -> original; 3 other tensors carried; wrote {out}\n"
    target = generator("original")
    target.load_state_dict(files.read(out).content, strict=True)
    x = torch.randn(1, 8, 9)
    assert torch.equal(target(x), net(x))
    assert len(list(tmp_path.iterdir())) == (1 if place == "in place" else 2)


@pytest.mark.parametrize("folder", [".", "sub"])
def test_relative_paths_work(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs(folder, exist_ok=True)
    torch.save(generator().state_dict(), "net.pt")
    convert_file(Path("net.pt"), Path(folder) / "out.pt", "plain")
    assert "0.weight" in load(f"{folder}/out.pt")


def test_whatever_lies_around_the_weights_survives(tmp_path, capsys):
    net = generator()
    adam = torch.optim.Adam(net.parameters())
    net(torch.randn(1, 8, 9)).sum().backward()
    adam.step()
    before = {
        "generator": net.state_dict(),
        "discriminators": [generator("original").state_dict(), generator("plain").state_dict()],
        "optim": adam.state_dict(),
        "steps": 2_500_000,
        "config": {"weight_decay": 0.1, "dims": (1, 2), "names": ["a"], "shape": torch.Size([2])},
        "loss": torch.tensor(3.0),
    }
    path = tmp_path / "do_02500000"
    torch.save(before, path)
    convert_file(path, path, "plain")
    after = load(path)
    assert list(after) == list(before)
    assert same(after["generator"], convert_state_dict(before["generator"]))
    assert type(after["generator"]) is type(before["generator"])
    assert after["generator"]._metadata == before["generator"]._metadata
    assert same(after["discriminators"][0], convert_state_dict(before["discriminators"][0]))
    assert same(after["discriminators"][1], before["discriminators"][1])
    assert after["optim"]["param_groups"] == before["optim"]["param_groups"]
    for index, state in before["optim"]["state"].items():
        assert same(after["optim"]["state"][index], state)
    assert (after["steps"], after["config"], after["loss"]) == (before["steps"], before["config"], before["loss"])
    out = capsys.readouterr().out
    assert "6 weights: 3 gv and 3 original -> plain; 13 other tensors carried" in out
    assert "optimizer's state is carried unchanged: it still belongs to g and v" in out


def test_an_optimizers_numbers_are_never_taken_for_weights(tmp_path):
    net = nn.Linear(3, 4)
    adam = torch.optim.Adam(net.parameters())
    net(torch.randn(2, 3)).sum().backward()
    adam.step()
    path = tmp_path / "train.pt"
    torch.save({"net": net.state_dict(), "adam": adam.state_dict()}, path)
    convert_file(path, path, "gv", dim=0, keys=["*"])
    after = load(path)
    assert list(after["net"]) == ["weight_g", "weight_v", "bias"]
    assert list(after["adam"]["state"][0]) == ["step", "exp_avg", "exp_avg_sq"]


def test_metadata_survive(tmp_path, capsys):
    source, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(generator().state_dict(), source, metadata={"format": "pt", "step": "7"})
    convert_file(source, out, "plain")
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"format": "pt", "step": "7"}
    capsys.readouterr()
    convert_file(source, tmp_path / "c.pt", "plain")
    assert "metadata left behind, which torch's format has no place for: format, step" in capsys.readouterr().out


def test_the_same_file_is_written_twice_alike(tmp_path):
    torch.save(generator().state_dict(), tmp_path / "in.pt")
    for suffix in (".pt", ".safetensors"):
        outs = [tmp_path / f"{name}{suffix}" for name in "ab"]
        for out in outs:
            convert_file(tmp_path / "in.pt", out, "plain")
        assert outs[0].read_bytes() == outs[1].read_bytes()


def test_tied_weights_do_not_grow_a_file(tmp_path):
    layer = in_form("original", nn.Linear(100, 100))
    net = nn.ModuleDict({"a": layer, "b": layer})
    torch.save(net.state_dict(), tmp_path / "in.pt")
    for to in ("plain", "gv"):
        convert_file(tmp_path / "in.pt", tmp_path / "out.pt", to)
        assert (tmp_path / "out.pt").stat().st_size < 50_000  # one matrix is 40,000 bytes
    convert_file(tmp_path / "in.pt", tmp_path / "out.safetensors", "plain")
    after = load_file(tmp_path / "out.safetensors")  # which has no ties: each is there in full
    assert torch.equal(after["a.weight"], after["b.weight"])


def test_modes_are_kept_and_new_files_have_the_usual_one(tmp_path):
    for suffix in (".pt", ".safetensors"):
        old, new = tmp_path / f"old{suffix}", tmp_path / f"new{suffix}"
        files.write(old, files.File(generator().state_dict()))
        (tmp_path / "usual").touch()
        old.chmod(0o640)
        convert_file(old, new, "plain")
        convert_file(old, old, "plain")
        assert old.stat().st_mode & 0o777 == 0o640
        assert new.stat().st_mode == (tmp_path / "usual").stat().st_mode


class Payload:
    """Unpickled carelessly it makes a folder."""

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_and_does_not_run(nested, zipped, tmp_path):
    payload = Payload()
    payload.path = tmp_path / "it ran"
    evil = {"weight_g": torch.ones(2, 1), "weight_v": torch.ones(2, 3), "x": payload} if nested else payload
    torch.save(evil, tmp_path / "evil.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"evil.pt holds \w+.mkdir, which is code and is not run; if you trust"):
        convert_file(tmp_path / "evil.pt", tmp_path / "out.pt", "plain")
    assert list(content(tmp_path)) == ["evil.pt"]
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert payload.path.exists()  # so the payload is a live one


def test_a_whole_pickled_model_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"holds torch.nn.modules.linear.Linear, which is code"):
        convert_file(tmp_path / "model.pt", tmp_path / "out.pt", "plain")


def damaged(path, kind):
    """Write a damaged file of one kind."""
    files.write(path, files.File(generator().state_dict()))
    whole = path.read_bytes()
    cases = {
        "empty": b"",
        "cut to half": whole[: len(whole) // 2],
        "cut by a byte": whole[:-1],
        "its first bytes": whole[:16],
        "text": b"not a checkpoint\n" * 99,
        "zeros": bytes(4096),
        "a huge header": b"\xff" * 8 + whole[8:],
    }
    path.write_bytes(cases[kind])


@pytest.mark.parametrize("kind", ["empty", "cut to half", "cut by a byte", "its first bytes", "text", "zeros"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ""])
def test_damaged_files_are_told(suffix, kind, tmp_path):
    path = tmp_path / f"net{suffix}"
    damaged(path, kind)
    before = content(tmp_path)
    with pytest.raises(UserError, match=r"net\S* is no (torch|safetensors) file, or a damaged one \(.+\)"):
        convert_file(path, path, "plain")
    assert content(tmp_path) == before


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def killed(action):
    """Run an action in a process of its own; say whether it was killed in the midst of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about threads, which the action does not use
        process = os.fork()
    if process == 0:
        try:
            action()
        finally:
            os._exit(0)
    _, status = os.waitpid(process, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors"])
@pytest.mark.parametrize("at", ["while writing", "before replacing"])
def test_a_process_killed_while_writing_leaves_the_old_file_whole(name, at, tmp_path, monkeypatch):
    path = tmp_path / name
    files.write(path, files.File(generator().state_dict()))
    before = path.read_bytes()

    def half(content, out, **options):
        out = out.name if hasattr(out, "name") and not isinstance(out, Path) else out
        Path(out).write_bytes(b"half of it")
        die()

    with monkeypatch.context() as patch:
        if at == "while writing":
            patch.setattr("torch.save", half)
            patch.setattr("safetensors.torch.save_file", half)
        else:
            patch.setattr("os.replace", lambda *paths: die())
        assert killed(lambda: convert_file(path, path, "plain"))
    assert path.read_bytes() == before
    assert [entry.suffix for entry in tmp_path.iterdir() if entry != path] == [".tmp"]  # so it was under way
    convert_file(path, path, "plain")
    assert "0.weight" in files.read(path).content


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("disk full\nstack"), MemoryError]
)
@pytest.mark.parametrize("name", ["net.pt", "net.safetensors"])
def test_a_failure_while_writing_leaves_nothing_behind(name, error, tmp_path, monkeypatch):
    path = tmp_path / name
    files.write(path, files.File(generator().state_dict()))
    before = content(tmp_path)

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("torch.save", fail)
    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(UserError, match=rf"cannot write {path} \((No space left on device|disk full|MemoryError)\)"):
        convert_file(path, path, "plain")
    assert content(tmp_path) == before


def test_ctrl_c_while_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "net.pt"
    torch.save(generator().state_dict(), path)
    before = content(tmp_path)
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        convert_file(path, path, "plain")
    assert content(tmp_path) == before


def test_the_file_and_its_folder_reach_the_disk_in_order(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr("os.fsync", lambda fd: calls.append(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd))
    monkeypatch.setattr("os.replace", lambda a, b: calls.append("replace") or replace(a, b))
    files.write(tmp_path / "net.pt", files.File({"w": torch.ones(2)}))
    written, step, folder = calls
    assert written.endswith(".tmp")
    assert (step, folder) == ("replace", str(tmp_path))


def test_without_safetensors_only_its_files_are_out_of_reach(tmp_path, monkeypatch):
    save_file(generator().state_dict(), tmp_path / "net.safetensors")
    torch.save(generator().state_dict(), tmp_path / "net.pt")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    convert_file(tmp_path / "net.pt", tmp_path / "out.pt", "plain")
    for source, out in (("net.safetensors", "b.pt"), ("net.pt", "b.safetensors")):
        with pytest.raises(UserError, match=r"safetensors not installed; pip install 'weightnorm\[checkpoints\]'"):
            convert_file(tmp_path / source, tmp_path / out, "plain")
    assert not list(tmp_path.glob("b.*"))


def test_dicts_without_end_are_no_checkpoint(tmp_path):
    endless = {"w": torch.ones(2)}
    endless["self"] = endless
    torch.save(endless, tmp_path / "net.pt")
    with pytest.raises(UserError, match="dicts lie in each other without end"):
        convert_file(tmp_path / "net.pt", tmp_path / "out.pt", "plain")


# ---- several files under one index


def spread(folder, suffix=".safetensors"):
    """Write a net over two files, lengths and directions apart; return its index."""
    folder.mkdir(exist_ok=True)
    sd = generator().state_dict()
    homes = {key: f"model-0000{1 + key.endswith('_v')}-of-00002{suffix}" for key in sd}
    for name in sorted(set(homes.values())):
        part = {key: value for key, value in sd.items() if homes[key] == name}
        files.write(folder / name, files.File(part, {"format": "pt", "part": name[6:11]} if suffix != ".bin" else {}))
    index = folder / ("pytorch_model.bin.index.json" if suffix == ".bin" else f"model{suffix}.index.json")
    index.write_text(json.dumps({"metadata": {"total_size": 1, "license": "MIT"}, "weight_map": homes}))
    (folder / "config.json").write_text("{}")
    return index, sd


def gathered(index):
    """Return the state dict of an index, and the files it names, read with nothing of ours."""
    names = set(json.loads(index.read_text())["weight_map"].values())
    sd = {}
    for name in names:
        sd |= load(index.parent / name) if name.endswith(".bin") else load_file(index.parent / name)
    return sd, names


@pytest.mark.parametrize("named", ["folder", "index"])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("place", ["a new folder", "in place", "an empty folder"])
def test_an_index_is_converted_as_a_whole(place, suffix, named, tmp_path, capsys):
    index, sd = spread(tmp_path / "in", suffix)
    folder = index.parent if place == "in place" else tmp_path / "out"
    if place == "an empty folder":
        folder.mkdir()
    source, out = (index, folder / index.name) if named == "index" else (index.parent, folder)
    for _ in range(3 if place == "in place" else 1):  # each time the old files give way to new ones
        convert_file(source, out, "original")
    after, names = gathered(folder / index.name)
    expected = convert_state_dict(sd, "original")
    assert after.keys() == expected.keys()
    assert all(torch.equal(after[key], expected[key]) for key in after)
    extra = {"config.json"} if place == "in place" else set()
    assert {path.name for path in folder.iterdir()} == names | {index.name} | extra
    record = json.loads((folder / index.name).read_text())
    assert record["metadata"] == {"total_size": sum(value.nbytes for value in after.values()), "license": "MIT"}
    assert "3 weights: gv -> original; 3 other tensors carried" in capsys.readouterr().out


def test_lengths_go_where_directions_are_and_headers_stay(tmp_path):
    index, _ = spread(tmp_path / "in")
    convert_file(index, tmp_path / "out", "plain")
    record = json.loads((tmp_path / "out" / index.name).read_text())["weight_map"]
    assert record["0.weight"] == record["2.weight"] == "model-00002-of-00002.safetensors"
    for name, part in (("model-00001-of-00002.safetensors", "00001"), ("model-00002-of-00002.safetensors", "00002")):
        with safe_open(tmp_path / "out" / name, "pt") as file:
            assert file.metadata() == {"format": "pt", "part": part}


def test_an_index_goes_into_one_file_if_the_name_says_so(tmp_path):
    index, sd = spread(tmp_path / "in")
    for name in ("one.pt", "one.safetensors"):
        convert_file(index.parent, tmp_path / name, "plain")
        after = files.read(tmp_path / name).content
        assert all(torch.equal(after[key], value) for key, value in convert_state_dict(sd).items())


@pytest.mark.parametrize("at", ["the second file", "the index"])
def test_a_failure_in_the_midst_of_an_index_leaves_the_old_one_whole(at, tmp_path, monkeypatch):
    index, _ = spread(tmp_path / "in")
    before = content(index.parent)
    replace = os.replace

    def fail(source, target):
        if str(target).endswith("00002.safetensors" if at == "the second file" else ".json"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr("os.replace", fail)
    for out in (index.parent, tmp_path / "new"):
        with pytest.raises(UserError, match=r"cannot write .*No space left"):
            convert_file(index, out, "plain")
    assert content(index.parent) == before
    assert not (tmp_path / "new").exists()


def test_a_failure_after_the_index_was_replaced_keeps_the_new_one_whole(tmp_path, monkeypatch):
    index, _ = spread(tmp_path / "in")
    replace = os.replace

    def replace_then_fail(source, target):
        replace(source, target)
        if str(target).endswith(".json"):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.replace", replace_then_fail)
    with pytest.raises(UserError):
        convert_file(index, index, "plain")
    assert "0.weight" in gathered(index)[0]


def test_a_kill_in_the_midst_of_an_index_leaves_the_old_one_whole(tmp_path, monkeypatch):
    index, sd = spread(tmp_path / "in")
    replace = os.replace
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda a, b: die() if b == index else replace(a, b))
        assert killed(lambda: convert_file(index, index, "plain"))
    after, _ = gathered(index)
    assert same(dict(sorted(after.items())), dict(sorted(sd.items())))
    convert_file(index, index, "plain")
    assert "0.weight" in gathered(index)[0]


MAP = {"a": "model-00001-of-00002.safetensors"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is no index: it must map each tensor to the name of a file beside it"),
        ("[]", "is no index"),
        ("{}", "is no index"),
        ('{"weight_map": []}', "is no index"),
        ('{"weight_map": {"a": 3}}', "is no index"),
        ('{"weight_map": {"a": "../../etc/passwd"}}', "is no index"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "is no index"),
        ('{"weight_map": {}, "metadata": 3}', "is no index"),
        ("[" * 100_000, "is no index"),
        (json.dumps({"weight_map": {"a": "gone.safetensors"}}), r"cannot read .*gone.safetensors \(No such file"),
        (json.dumps({"weight_map": MAP}), "says that a is in model-00001-of-00002.safetensors, and it is not"),
        (json.dumps({"weight_map": {"a": "config.json"}}), "config.json is no torch file, or a damaged one"),
        (json.dumps({"weight_map": {"a": "list.pt"}}), "list.pt holds something else than tensors by name"),
        (
            json.dumps({"weight_map": {"0.bias": MAP["a"], "a": "twice.safetensors"}}),
            "0.bias is in twice.safetensors and in model-00001-of-00002.safetensors; one of them",
        ),
    ],
)
def test_an_index_that_is_wrong_is_told(text, words, tmp_path):
    index, _ = spread(tmp_path / "in")
    torch.save([1], index.parent / "list.pt")
    save_file({"0.bias": torch.ones(1)}, index.parent / "twice.safetensors")
    index.write_text(text)
    before = content(index.parent)
    with pytest.raises(UserError, match=words):
        convert_file(index.parent, index.parent, "plain")
    assert content(index.parent) == before


def test_a_folder_must_have_one_index(tmp_path):
    with pytest.raises(UserError, match=r"is a folder and has no \*.index.json; name the file to read"):
        convert_file(tmp_path, tmp_path, "plain")
    index, _ = spread(tmp_path / "in")
    (index.parent / "pytorch_model.bin.index.json").write_text("{}")
    with pytest.raises(UserError, match=r"has model.safetensors.index.json, pytorch_model.bin.index.json; name the"):
        convert_file(index.parent, tmp_path / "out", "plain")
