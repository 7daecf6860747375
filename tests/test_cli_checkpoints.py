"""inspect, convert and fold: what they print, and one line for a mistake."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from test_checkpoints import in_form
from test_checkpoints_files import damaged, generator, spread
from weightnorm import cli
from weightnorm.checkpoints.spelling import SPELLINGS
from weightnorm.cli_checkpoints import COMMANDS
from weightnorm.cli_checkpoints import SPELLINGS as OFFERED


def words(text):
    return text.replace("│", " ").split()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_comes_without_torch(command):
    arguments = [command.name, "--help"]
    code = f"import sys; from weightnorm import cli; cli.run({arguments!r}); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_explains_every_option(command, capsys):
    assert cli.run([command.name, "--help"]) == 0
    text = "".join(capsys.readouterr().out.split())
    for option in command.params:
        assert (
            option.metavar or option.name.upper() if option.param_type_name == "argument" else option.opts[0]
        ) in text
        assert "".join((getattr(option, "help", "") or "").split()) in text


def test_every_spelling_is_offered():
    assert OFFERED == SPELLINGS


@pytest.fixture
def net(tmp_path, monkeypatch):
    """HiFi-GAN's shapes in torch's older spelling, in the current folder as net.pt."""
    monkeypatch.chdir(tmp_path)
    net = generator()
    torch.save(net.state_dict(), "net.pt")
    return net


def run(*arguments):
    return cli.run([str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["fold", "net.pt", "out.pt"], "3 weights: gv -> plain; 3 other tensors carried; wrote out.pt\n"),
        (["fold", "net.pt", "net.pt"], "3 weights: gv -> plain; 3 other tensors carried; wrote net.pt\n"),
        (
            ["convert", "net.pt", "out.safetensors", "--to", "original"],
            "3 weights: gv -> original; 3 other tensors carried; wrote out.safetensors\n",
        ),
        (
            ["convert", "net.pt", "out", "--to", "gv", "--dim", "none"],
            "3 weights: gv -> gv; 3 other tensors carried; wrote out\n",
        ),
        (
            ["convert", "net.pt", "out.pt", "--to", "plain", "--keys", "0.*", "--keys", "1.*"],
            "2 weights: gv -> plain; 5 other tensors carried; wrote out.pt\n",
        ),
    ],
)
def test_what_was_done_is_told_in_one_line(arguments, line, net, capsys):
    assert run(*arguments) == 0
    assert capsys.readouterr() == (line, "")


def test_folding_what_is_folded_changes_nothing(net, capsys):
    run("fold", "net.pt", "out.pt")
    assert run("fold", "out.pt", "out.pt") == 0
    assert capsys.readouterr().out.endswith("no normalised weights; 6 other tensors carried; wrote out.pt\n")


def test_from_ours_to_upstream_hifi_gan_and_back(net, capsys):
    x = torch.randn(1, 8, 9)
    ours = nn.Sequential(net[0], in_form("original", nn.ConvTranspose1d(16, 8, 16, 8), dim=1), net[2])
    save_file(ours.state_dict(), "ours.safetensors")
    assert run("convert", "ours.safetensors", "g_02500000", "--to", "gv", "--dim", "0") == 0
    net.load_state_dict(torch.load("g_02500000", weights_only=True), strict=True)
    torch.testing.assert_close(net(x), ours(x), rtol=1e-5, atol=1e-6)
    assert net[1].weight_g.shape == (16, 1, 1)
    assert run("convert", "g_02500000", "back.safetensors", "--to", "original", "--dim", "1", "--keys", "1.weight") == 0
    ours.load_state_dict(load_file("back.safetensors"), strict=True)
    torch.testing.assert_close(ours(x), net(x), rtol=1e-5, atol=1e-6)


def test_plain_weights_are_normalised_where_keys_say(net, capsys):
    run("fold", "net.pt", "plain.safetensors")
    assert run("convert", "plain.safetensors", "gv.pt", "--to", "gv", "--keys", "*.weight", "--dim", "0") == 0
    x = torch.randn(1, 8, 9)
    before = net(x)
    net.load_state_dict(torch.load("gv.pt", weights_only=True), strict=True)
    torch.testing.assert_close(net(x), before, rtol=1e-5, atol=1e-6)


def test_inspect_shows_axes_and_lengths(net, capsys):
    net[1].weight_g.data[3] = 0
    net[1].weight_g.data[4] = -7
    torch.save({"generator": net.state_dict(), "steps": 3}, "g_03")
    assert run("inspect", "g_03") == 0
    lines = capsys.readouterr().out.splitlines()
    cells = [words(line) for line in lines if "generator/" in line]
    assert [row[:4] for row in cells] == [
        ["generator/0.weight", "16x8x7", "gv", "0"],
        ["generator/1.weight", "16x8x16", "gv", "0"],
        ["generator/2.weight", "1x8x7", "gv", "0"],
    ]
    g, v = net[1].weight_g.detach().flatten(), net[1].weight_v.detach()
    norms = v.flatten(1).norm(dim=1)
    expected = [g.min(), g.double().median(), g.max(), norms.min(), norms.max()]
    assert [float(cell) for cell in cells[1][4:9]] == pytest.approx([float(x) for x in expected], rel=1e-3)
    assert cells[1][4] == "-7"
    assert cells[1][9] == "1"
    assert lines[-1] == "3 weights: gv, 3,033 numbers in g and v; 3 plain tensors"


def test_inspect_shows_what_is_open_and_what_is_odd(tmp_path, capsys):
    pair = {"g": torch.ones(4), "v": torch.ones(4, 4)}
    sd = {f"flat.weight_{half}": value for half, value in pair.items()}
    sd |= {"lone.weight_g": torch.ones(4, 1), "odd.weight_g": torch.ones(7), "odd.weight_v": torch.ones(4, 3)}
    sd |= {"whole.weight_g": torch.ones(()), "whole.weight_v": torch.ones(4, 3)}
    sd |= {"group.weight_g": torch.ones(2, 1, 3, 1), "group.weight_v": torch.ones(4, 3, 5)}
    sd |= {"empty.weight_g": torch.ones(4, 1), "empty.weight_v": torch.ones(4, 0)}
    sd |= {"log.parametrizations.weight.0.log_g": torch.tensor(True)}
    sd |= {f"log.parametrizations.weight.original{i}": torch.zeros(4, 3 if i else 1) for i in (0, 1)}
    sd |= {"\x1b[2J[red]name.weight_g": torch.ones(4, 1), "\x1b[2J[red]name.weight_v": torch.ones(4, 3)}
    torch.save(sd, tmp_path / "net.pt")
    assert run("inspect", tmp_path / "net.pt") == 0
    out = capsys.readouterr().out
    rows = {words(line)[0]: words(line)[1:] for line in out.splitlines() if ".weight" in line}
    assert rows["flat.weight"][:5] == ["4x4", "gv", "0", "or", "1?"]
    assert rows["lone.weight"][:4] == ["–", "gv", "no", "v"]
    assert rows["odd.weight"][:4] == ["4x3", "gv", "fits", "none"]
    assert rows["whole.weight"][:5] == ["4x3", "gv", "whole", "tensor", "1"]
    assert rows["group.weight"][:6] == ["4x3x5", "gv", "1", "in", "2", "groups"]
    assert rows["empty.weight"] == ["4x0", "gv", "0", *["–"] * 6]
    assert rows["log.weight"] == ["4x3", "original,", "log", "g", "0", "1", "1", "1", "0", "0", "4"]
    assert r"\x1b[2J[red]name.weight" in rows
    assert "8 weights: 7 gv and 1 original" in out


def test_inspect_reads_an_index_and_plain_weights(tmp_path, capsys):
    index, _ = spread(tmp_path / "in")
    for source in (index, index.parent):
        assert run("inspect", source) == 0
        assert "3 weights: gv, 3,033 numbers in g and v; 3 plain tensors" in capsys.readouterr().out
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "plain.pt")
    assert run("inspect", tmp_path / "plain.pt") == 0
    assert capsys.readouterr().out == "no normalised weights; 2 plain tensors\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["convert", "net.pt", "out.pt"], "Missing option '--to'"),
        (["convert", "net.pt", "out.pt", "--to", "folded"], "'folded' is not one of 'plain', 'gv', 'original'"),
        (["convert", "net.pt", "out.pt", "--to", "gv", "--dim", "x"], "'x' is not an axis, 'none' or 'auto'"),
        (["convert", "net.pt", "out.pt", "--to", "gv", "--dim", "3"], "0.weight: dim=3 names no axis of a weight with"),
        (["convert", "net.pt", "out.pt", "--to", "gv", "--keys", "a*"], "keys=a* match no weight"),
        (["convert", "plain.pt", "out.pt", "--to", "gv"], "plain weights do not say which of them to normalise"),
        (["fold", "net.pt"], "Missing argument 'OUT'"),
        (["inspect"], "Missing argument 'IN'"),
        (["inspect", "gone.pt"], "cannot read gone.pt (No such file or directory)"),
        (["fold", "gone.safetensors", "out.pt"], "cannot read gone.safetensors (No such file or directory)"),
        (["fold", "gone.index.json", "out"], "cannot read gone.index.json (No such file or directory)"),
        (["fold", ".", "out.pt"], ". is a folder and has no *.index.json; name the file to read"),
        (["fold", "net.pt", "gone/out.pt"], "cannot write gone/out.pt (No such file or directory)"),
        (["fold", "net.pt", "/dev/null/out.pt"], "cannot write /dev/null/out.pt (Not a directory)"),
        (["fold", "net.pt", "folder"], "cannot write folder (Is a directory)"),
        (
            ["fold", "net.pt", "out.onnx"],
            "cannot tell the format of out.onnx by its suffix; use one of .safetensors, .pt",
        ),
        (
            ["fold", "nested.pt", "out.safetensors"],
            "holds tensors by name and nothing else; 'a' is a dict. Write a .pt",
        ),
        (["fold", "list.pt", "out.safetensors"], "list.pt holds no state dict: no tensors by name"),
        (["inspect", "number.pt"], "number.pt holds no state dict: no tensors by name"),
        (["convert", "number.pt", "out.pt", "--to", "gv"], "number.pt holds no state dict: no tensors by name"),
        (["fold", "square.pt", "out.pt"], "a.weight: g of shape (4,) with v of shape (4, 4) fits axis 0 and axis 1"),
        (["fold", "lone.pt", "out.pt"], r"\x1b[2J.weight: \x1b[2J.weight_g is there and \x1b[2J.weight_v is not"),
        (["fold", "int8.pt", "out.pt"], "a.weight is of torch.int8, which cannot be normalised"),
        (["fold", "half.pt", "out.pt"], "half.pt is no torch file, or a damaged one"),
        (["inspect", "half.safetensors"], "half.safetensors is no safetensors file, or a damaged one"),
        (["inspect", "huge.safetensors"], "huge.safetensors is no safetensors file, or a damaged one"),
        (["inspect", "model.pt"], "model.pt holds torch.nn.modules.linear.Linear, which is code and is not run"),
    ],
)
def test_a_mistake_is_told_in_one_line_and_nothing_is_written(arguments, expected, net, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    pair = {"a.weight_g": torch.ones(4), "a.weight_v": torch.ones(4, 4)}
    contents = {
        "plain": nn.Linear(2, 2).state_dict(),
        "nested": {"a": {"w": torch.ones(2)}, "steps": 3},
        "list": [torch.ones(2)],
        "number": 5,
        "square": pair,
        "lone": {"\x1b[2J.weight_g": torch.ones(4, 1)},
        "int8": {"a.weight_g": torch.ones(4, 1), "a.weight_v": torch.ones(4, 3, dtype=torch.int8)},
        "model": nn.Linear(2, 2),
    }
    for name, value in contents.items():
        torch.save(value, f"{name}.pt")
    damaged(tmp_path / "half.pt", "cut to half")
    damaged(tmp_path / "half.safetensors", "cut to half")
    damaged(tmp_path / "huge.safetensors", "a huge header")
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("weightnorm: ")
    assert expected in err
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert not list((tmp_path / "folder").iterdir())


def test_the_pages_commands_run(net, capsys):
    page = (Path(__file__).parent.parent / "docs" / "checkpoints.md").read_text()
    commands = re.findall(r"^weightnorm (.*)$", page, re.M)
    torch.save({"generator": net.state_dict()}, "g_02500000")
    assert [run(*shlex.split(command)) for command in commands] == [0, 0, 0, 0]
    (net_,) = torch.load("upstream.pt", weights_only=True).values()
    assert {key: value.shape for key, value in net_.items()} == {k: v.shape for k, v in net.state_dict().items()}
