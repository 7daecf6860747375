"""State dicts in every spelling, against torch's own modules: what they save is read, what is written they load."""

import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm as new_weight_norm

from weightnorm import convert_state_dict
from weightnorm.checkpoints.respell import ZERO_ROW
from weightnorm.checkpoints.spelling import SPELLINGS, find

NEW = {"rtol": 1e-6, "atol": 1e-7}  # float32's rounding of a composed weight


def in_form(spelling, layer, name="weight", dim=0):
    """Put torch's own weight norm of a spelling on a layer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the older one is deprecated
        if spelling == "plain":
            return layer
        return (new_weight_norm if spelling == "original" else nn.utils.weight_norm)(layer, name, dim)


def rounded(a, b):
    torch.testing.assert_close(a, b, **NEW)


# a layer, an input, the parameter's name, the axis that torch is told
LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), torch.randn(3, 5), "weight", 0),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), torch.randn(2, 4, 5, 5), "weight", 0),
    "HiFi-GAN's ups, on the input axis": (lambda: nn.ConvTranspose1d(8, 4, 16, 8), torch.randn(2, 8, 5), "weight", 0),
    "ups on the output axis": (lambda: nn.ConvTranspose1d(8, 4, 16, 8), torch.randn(2, 8, 5), "weight", 1),
    "wav2vec2's positions": (lambda: nn.Conv1d(8, 8, 6, groups=2), torch.randn(2, 8, 9), "weight", 2),
    "whole tensor": (lambda: nn.Conv1d(4, 6, 3), torch.randn(2, 4, 9), "weight", None),
    "one output": (lambda: nn.Conv1d(4, 1, 7), torch.randn(2, 4, 9), "weight", 0),
    "whole tensor of one output": (lambda: nn.Conv1d(4, 1, 7), torch.randn(2, 4, 9), "weight", None),
    "axis of size one": (lambda: nn.Linear(1, 4), torch.randn(3, 1), "weight", 1),
    "counted from the end": (lambda: nn.Linear(5, 4), torch.randn(3, 5), "weight", -2),
    "attention": (lambda: nn.MultiheadAttention(8, 2), (torch.randn(3, 2, 8),) * 3, "in_proj_weight", 0),
    "recurrent": (lambda: nn.GRUCell(3, 4), torch.randn(2, 3), "weight_hh", 0),
}


def output(layer, x):
    y = layer(*x) if isinstance(x, tuple) else layer(x)
    return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize("to", SPELLINGS)
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("kind", LAYERS)
def test_every_spelling_goes_into_every_other(kind, spelling, to):
    make, x, name, dim = LAYERS[kind]
    source, target = in_form(spelling, make(), name, dim), in_form(to, make(), name, dim)
    sd = convert_state_dict(source.state_dict(), to, model=target if spelling == "plain" else None)
    target.load_state_dict(sd, strict=True)
    if "plain" in (spelling, to) and spelling != to:
        rounded(output(target, x), output(source, x))
    else:
        assert torch.equal(output(target, x), output(source, x))
    back = convert_state_dict(sd, spelling, model=source)
    assert {key: value.shape for key, value in back.items()} == {
        key: value.shape for key, value in source.state_dict().items()
    }


@pytest.mark.parametrize(("spelling", "to"), [("gv", "original"), ("original", "gv")])
def test_g_and_v_are_carried_bit_for_bit(spelling, to):
    sd = in_form(spelling, nn.Conv2d(3, 4, 3)).state_dict()
    converted = convert_state_dict(sd, to)
    for old, new in zip(find(sd), find(converted), strict=True):
        assert new.g.data_ptr() == old.g.data_ptr()
        assert new.v.data_ptr() == old.v.data_ptr()
    again = convert_state_dict(converted, spelling)
    assert list(again) == list(sd)
    assert all(torch.equal(again[key], sd[key]) for key in sd)


class Net(nn.Module):
    """Everything that ``param_groups`` tells apart."""

    def __init__(self, wrap=lambda layer, **options: layer):
        super().__init__()
        self.pre = wrap(nn.Conv1d(3, 8, 7))
        self.ups = nn.ModuleList([wrap(nn.ConvTranspose1d(8, 4, 4)), wrap(nn.ConvTranspose1d(4, 6, 4, groups=2))])
        self.norm = nn.BatchNorm1d(6)
        self.table = nn.Embedding(5, 3)


def test_a_plain_model_says_what_to_normalise_and_along_which_axis():
    net = Net()
    sd = net.state_dict()
    converted = convert_state_dict(sd, "gv", model=net)
    shapes = {stored.name: tuple(stored.g.shape) for stored in find(converted)}
    assert shapes == {"pre.weight": (8, 1, 1), "ups.0.weight": (1, 4, 1), "ups.1.weight": (2, 1, 3, 1)}
    assert "table.weight" in converted
    rounded(converted["ups.1.weight_g"][1, 0, 2, 0], sd["ups.1.weight"][2:, 2].norm())
    back = convert_state_dict(converted)
    assert list(back) == list(sd)
    for key in sd:
        rounded(back[key], sd[key])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module."])
@pytest.mark.parametrize("to", ["gv", "original"])
def test_prefixes_are_carried_through_and_seen_through(prefix, to):
    net = Net()
    plain = net.state_dict()
    wrapped = {prefix + key: value for key, value in plain.items()}
    converted = convert_state_dict(wrapped, to, model=net)
    assert [key.removeprefix(prefix) for key in converted] == list(convert_state_dict(plain, to, model=net))
    assert list(convert_state_dict(converted)) == list(wrapped)


def test_wrappers_on_the_models_side_are_seen_through():
    net = Net()
    expected = list(convert_state_dict(net.state_dict(), "gv", model=net))
    wrapper = nn.Module()
    wrapper.module = Net()
    compiled = nn.Module()  # named as torch.compile does
    compiled._orig_mod, wrapper.module.ups[0] = wrapper.module.ups[0], compiled
    assert list(convert_state_dict(net.state_dict(), "gv", model=wrapper)) == expected
    inner = convert_state_dict(wrapper.state_dict(), "original", model=net)
    assert "module.ups.0._orig_mod.parametrizations.weight.original0" in inner


def test_dim_moves_lengths_to_another_axis_and_back():
    ours = in_form("original", nn.ConvTranspose1d(8, 4, 16, 8), dim=1)
    sd = ours.state_dict()
    upstream = in_form("gv", nn.ConvTranspose1d(8, 4, 16, 8), dim=0)
    moved = convert_state_dict(sd, "gv", dim=0)
    upstream.load_state_dict(moved, strict=True)
    x = torch.randn(2, 8, 5)
    rounded(upstream(x), ours(x))
    rounded(moved["weight_g"].flatten(), ours.weight.flatten(1).norm(dim=1))

    back = convert_state_dict(moved, "original", model=ours)
    rounded(back["parametrizations.weight.original0"], sd["parametrizations.weight.original0"])
    ours.load_state_dict(back, strict=True)
    rounded(upstream(x), ours(x))


def test_dim_leaves_weights_alone_that_lie_along_it():
    net = Net(lambda layer: in_form("gv", layer, dim=0))
    sd = net.state_dict()
    for dim in (0, -3):
        assert all(torch.equal(value, sd[key]) for key, value in convert_state_dict(sd, "gv", dim=dim).items())


def test_dim_none_is_the_whole_tensor():
    target = in_form("original", nn.Linear(3, 4), dim=None)
    layer = in_form("gv", nn.Linear(3, 4))
    target.load_state_dict(convert_state_dict(layer.state_dict(), "original", dim=None), strict=True)
    rounded(target.weight, layer(torch.eye(3)).T - layer.bias[:, None])


def test_one_vector_is_one_vector_in_any_shape_of_its_length():
    sd = in_form("gv", nn.Conv1d(4, 1, 7), dim=None).state_dict()
    sd["weight_v"] *= 3  # so that v is not w
    converted = convert_state_dict(sd, "gv", dim=0)
    assert converted["weight_g"].shape == (1, 1, 1)
    assert converted["weight_g"].item() == sd["weight_g"].item()
    assert converted["weight_v"] is sd["weight_v"]


def paddle(v, g):
    return {"conv.weight_g": torch.rand(g) + 0.5, "conv.weight_v": torch.randn(v)}


@pytest.mark.parametrize(
    ("v", "g", "axis", "options"),
    [
        ((6, 4, 3), 6, 0, {}),
        ((6, 4, 3), 4, 1, {}),
        ((6, 4), 1, None, {}),
        ((4, 4, 3), 4, 0, {"dim": 0}),
        ((4, 4, 3), 4, 1, {"dim": 1}),
        ((4, 4, 3), 4, 1, {"model": nn.ModuleDict({"conv": nn.ConvTranspose1d(4, 4, 3)})}),
        ((4, 4, 3), 4, 0, {"model": nn.ModuleDict({"conv": in_form("gv", nn.ConvTranspose1d(4, 4, 3))})}),
    ],
)
def test_paddles_lengths_are_read_and_shaped_as_torchs(v, g, axis, options):
    sd = paddle(v, (g,))
    shape = [size if index == axis else 1 for index, size in enumerate(v)] if axis is not None else []
    written = convert_state_dict(sd, "original", **options)["conv.parametrizations.weight.original0"]
    assert list(written.shape) == shape
    assert torch.equal(written.flatten(), sd["conv.weight_g"])
    length = torch.norm_except_dim(sd["conv.weight_v"], 2, -1 if axis is None else axis)
    expected = sd["conv.weight_v"] / length * written
    rounded(convert_state_dict(sd, **options)["conv.weight"], expected)


def test_a_grouped_transposed_convolutions_flat_lengths_need_the_layer():
    layer = nn.ConvTranspose1d(6, 8, 3, groups=2)
    sd = paddle((6, 4, 3), (8,))
    with pytest.raises(ValueError, match=r"conv.weight: g of shape \(8,\) .* grouped transposed convolution, pass mod"):
        convert_state_dict(sd)
    w = convert_state_dict(sd, model=nn.ModuleDict({"conv": layer}))["conv.weight"]
    rounded(w.unflatten(0, (2, 3)).square().sum((1, 3)).sqrt().flatten(), sd["conv.weight_g"])


def log_form(flag=True):
    sd = in_form("original", nn.Conv1d(3, 4, 3)).state_dict()
    plain = convert_state_dict(sd)["weight"]
    key = "parametrizations.weight.original0"
    return plain, {**sd, key: sd[key].log() if flag else sd[key], "parametrizations.weight.0.log_g": torch.tensor(flag)}


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("to", SPELLINGS)
def test_lengths_kept_as_logarithms_are_read_and_never_written(to, flag):
    w, sd = log_form(flag)
    target = in_form(to, nn.Conv1d(3, 4, 3))
    target.load_state_dict(convert_state_dict(sd, to), strict=True)
    rounded(convert_state_dict(target.state_dict())["weight"], w)


def test_logarithms_stay_tied_and_narrow():
    _, sd = log_form()
    sd = {f"a.{key}": value.bfloat16() if value.is_floating_point() else value for key, value in sd.items()}
    sd |= {key.replace("a.", "b."): value for key, value in sd.items()}
    converted = convert_state_dict(sd, "gv")
    assert converted["a.weight_g"].dtype == torch.bfloat16
    assert converted["a.weight_g"].data_ptr() == converted["b.weight_g"].data_ptr()


LOOKALIKES = {
    "scalars": {"alpha_g": torch.ones(()), "alpha_v": torch.ones(())},
    "vectors": {"mean_g": torch.ones(4), "mean_v": torch.ones(4)},
    "a gate and values": {"attn.k_g": torch.ones(4), "attn.k_v": torch.ones(4, 3)},
    "a scalar beside a matrix": {"loss_g": torch.ones(()), "loss_v": torch.ones(4, 3)},
    "attention's values": {"weight_q": torch.ones(4, 3), "weight_k": torch.ones(4, 3), "weight_v": torch.ones(4, 3)},
    "no tensors": {"weight_g": 3, "weight_v": True},
    "one original": {"parametrizations.weight.original": torch.ones(4, 3)},
    "two factors": {
        "parametrizations.weight.original0": torch.ones(4, 2),
        "parametrizations.weight.original1": torch.ones(2, 3),
    },
    "three originals": {f"parametrizations.weight.original{i}": torch.ones(4, 3 if i else 1) for i in range(3)},
    "a second parametrization": {
        "parametrizations.weight.original0": torch.ones(4, 1),
        "parametrizations.weight.original1": torch.ones(4, 3),
        "parametrizations.weight.1._u": torch.ones(4),
    },
    "not strings": {0: torch.ones(2), ("a", 1): torch.ones(2)},
}


@pytest.mark.parametrize("kind", LOOKALIKES)
def test_what_is_no_weight_norm_is_carried(kind):
    sd = LOOKALIKES[kind]
    converted = convert_state_dict(sd)
    assert list(converted) == list(sd)
    assert all(converted[key] is sd[key] for key in sd)


def test_a_models_own_parametrization_of_the_same_shapes_is_left_alone():
    class Scaled(nn.Module):
        def forward(self, scale, w):
            return scale * w

        def right_inverse(self, w):
            return torch.ones(w.shape[0], 1), w

    layer = nn.Linear(3, 4)
    parametrize.register_parametrization(layer, "weight", Scaled())
    sd = nn.Sequential(layer, in_form("original", nn.Linear(4, 2))).state_dict()
    model = nn.Sequential(layer, in_form("original", nn.Linear(4, 2)))
    converted = convert_state_dict(sd, model=model)
    assert "0.parametrizations.weight.original0" in converted
    assert "1.weight" in converted
    assert "0.weight" in convert_state_dict(sd)  # nothing but the model could tell


PAIR = {"a.weight_g": torch.ones(4, 1), "a.weight_v": torch.ones(4, 3)}
PLAIN = {"a.weight": torch.ones(4, 3), "a.bias": torch.ones(4)}


@pytest.mark.parametrize(
    ("sd", "options", "words"),
    [
        ({"a.weight_g": torch.ones(4, 1)}, {}, "a.weight: a.weight_g is there and a.weight_v is not"),
        (
            {"a.parametrizations.weight.original1": torch.ones(4, 3)},
            {},
            r"a.weight: a.parametrizations.weight.original1 is there and a.parametrizations.weight.original0 is not",
        ),
        (
            paddle((4, 4), (4,)),
            {},
            r"conv.weight: g of shape \(4,\) with .* fits axis 0 and axis 1; say .* dim= or mod",
        ),
        (paddle((4, 3), (7,)), {}, r"conv.weight: g of shape \(7,\) with v of shape \(4, 3\) fits no axis"),
        (paddle((4, 3), (4, 2)), {}, "fits no axis"),
        (paddle((4, 3), (7,)), {"dim": 0}, "fits no axis"),
        ({**PAIR, **PLAIN}, {}, "a.weight would be there twice"),
        (PLAIN, {"to": "gv"}, "plain weights do not say which of them to normalise; pass model=, or keys= and dim="),
        (PLAIN, {"to": "gv", "dim": 0}, "plain weights do not say"),
        (PLAIN, {"to": "gv", "keys": "a.*"}, "a.weight: nothing says along which axis to normalise it; .* dim="),
        (PLAIN, {"to": "gv", "keys": "b.*", "dim": 0}, r"keys=b.\* match no weight"),
        (PAIR, {"keys": "b.*"}, r"keys=b.\* match no weight"),
        (PLAIN, {"to": "gv", "model": nn.Linear(3, 4)}, "no weight that the model normalises is in the state dict"),
        (PAIR, {"to": "gv", "dim": 2}, "a.weight: dim=2 names no axis of a weight with 2 axes"),
        (PAIR, {"dim": "output"}, "dim must be an axis, None .* or 'auto'; got 'output'"),
        (PAIR, {"to": "folded"}, "to must be one of plain, gv, original; got 'folded'"),
        (
            PAIR,
            {"model": nn.ModuleDict({"a": nn.Linear(5, 4)})},
            r"a.weight: it has shape \(4, 3\), and in the model \(4, 5\)",
        ),
        ({"model": PAIR, "epoch": 3}, {}, r"sd holds no tensors; pass one of the state dicts in it: sd\['model'\]"),
    ],
)
def test_what_cannot_be_told_is_asked(sd, options, words):
    with pytest.raises(ValueError, match=words):
        convert_state_dict(sd, **options)


def test_only_state_dicts_of_floating_point_weights_are_taken():
    with pytest.raises(TypeError, match=r"sd must be a state dict; got Linear. Pass model.state_dict\(\)"):
        convert_state_dict(nn.Linear(2, 2))
    for dtype in (torch.int8, torch.float8_e4m3fn, torch.complex64):
        sd = {key: value.to(dtype) for key, value in PAIR.items()}
        with pytest.raises(TypeError, match=f"a.weight is of {dtype}, which cannot be normalised"):
            convert_state_dict(sd)


def test_sharded_weights_are_refused():
    class Sharded(torch.Tensor):
        def full_tensor(self):
            raise NotImplementedError

    with pytest.raises(TypeError, match=r"a.weight is sharded over devices; gather it first with .full_tensor\(\)"):
        convert_state_dict({key: value.as_subclass(Sharded) for key, value in PAIR.items()})


def test_keys_say_what_is_touched():
    sd = Net(lambda layer: in_form("gv", layer)).state_dict()
    converted = convert_state_dict(sd, keys=["ups.*", "none"])
    assert {"pre.weight_g", "ups.0.weight", "ups.1.weight"} <= converted.keys()
    custom_cell = {"cell.weight_g": torch.ones(4, 3), **PAIR}
    assert "a.weight" in convert_state_dict(custom_cell, keys="a.*")


def test_keys_do_not_take_the_halves_of_a_weight_for_weights():
    assert list(convert_state_dict({**PAIR, "b.weight": torch.ones(2, 2)}, "gv", keys="*", dim=0)) == [
        *("a.weight_g", "a.weight_v"),
        *("b.weight_g", "b.weight_v"),
    ]


def test_keys_and_dim_normalise_plain_weights():
    sd = Net().state_dict()
    converted = convert_state_dict({f"module.{key}": value for key, value in sd.items()}, "gv", keys="ups.*", dim=0)
    assert [(stored.name, stored.g.shape) for stored in find(converted)] == [
        ("module.ups.0.weight", (8, 1, 1)),
        ("module.ups.1.weight", (4, 1, 1)),
    ]
    assert {"module.ups.0.bias", "module.pre.weight"} <= converted.keys()


@pytest.mark.parametrize("to", ["gv", "original"])
def test_zero_rows_stay_zero_in_torch_and_every_time_alike(to):
    layer = nn.Linear(3, 4)
    with torch.no_grad():
        layer.weight[1] = 0
    target = in_form(to, nn.Linear(3, 4))
    sd, again = (convert_state_dict(layer.state_dict(), to, model=target) for _ in range(2))
    assert all(torch.equal(sd[key], again[key]) for key in sd)
    target.load_state_dict(sd)
    x = torch.randn(5, 3)
    rounded(target(x), layer(x))
    assert torch.equal(target(x)[:, 1], layer.bias[1].expand(5))
    (stored,) = find(sd)
    assert torch.equal(stored.v[1], torch.full((3,), ZERO_ROW))
    assert stored.g[1] == 0
    rounded(convert_state_dict(sd)["weight"], layer.weight.detach())


def test_zero_directions_in_a_file_compose_to_zero():
    assert not convert_state_dict({"weight_g": torch.ones(2, 1), "weight_v": torch.zeros(2, 3)})["weight"].any()


def test_what_is_not_finite_stays_for_the_user_to_see():
    w = torch.ones(2, 3)
    w[0, 1] = torch.nan
    sd = convert_state_dict({"w": w}, "gv", keys="w", dim=0)
    assert sd["w_v"] is w
    assert convert_state_dict({"weight_g": sd["w_g"], "weight_v": sd["w_v"]})["weight"][0].isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_kept_and_narrow_ones_computed_wide(dtype):
    layer = in_form("original", nn.Linear(512, 4)).to(dtype)
    sd = layer.state_dict()
    (stored,) = find(sd)
    w = convert_state_dict(sd)["weight"]
    assert w.dtype == dtype
    v, g = stored.v.double(), stored.g.double()
    close = {"rtol": torch.finfo(dtype).eps * (8 if dtype == torch.float64 else 1), "atol": 0}  # the oracle rounds too
    torch.testing.assert_close(w.double(), g * v / v.norm(dim=1, keepdim=True), **close)
    (made,) = find(convert_state_dict({"weight": w}, "gv", keys="weight", dim=0))
    assert made.g.dtype == made.v.dtype == dtype
    exact = w.double().norm(dim=1, keepdim=True)
    torch.testing.assert_close(made.g.double(), exact, **close)


def test_tied_weights_stay_tied():
    net = nn.ModuleDict({"a": in_form("original", nn.Linear(3, 4)), "c": in_form("original", nn.Linear(3, 4))})
    net["b"] = net["a"]
    sd = net.state_dict()
    plain = convert_state_dict(sd)
    assert plain["a.weight"].data_ptr() == plain["b.weight"].data_ptr() != plain["c.weight"].data_ptr()
    for options in ({"keys": "*.weight", "dim": 0}, {"model": net}, {"keys": "*.weight", "dim": 1}):
        for back in (convert_state_dict(plain, "gv", **options), convert_state_dict(sd, "gv", **options)):
            for half in ("weight_g", "weight_v"):
                assert back[f"a.{half}"].data_ptr() == back[f"b.{half}"].data_ptr() != back[f"c.{half}"].data_ptr()


def test_a_model_in_module_form_is_given_what_it_holds_and_no_more():
    wav2vec2 = nn.Sequential(nn.Linear(4, 4), in_form("original", nn.Conv1d(8, 8, 6), dim=2), nn.Linear(4, 4))
    plain = convert_state_dict(wav2vec2.state_dict())
    wav2vec2.load_state_dict(convert_state_dict(plain, "original", model=wav2vec2), strict=True)


def test_a_tied_model_is_known_under_all_names():
    net = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(3, 4)})
    net["b"].weight = net["a"].weight
    assert {"a.weight_g", "b.weight_g"} <= convert_state_dict(net.state_dict(), "gv", model=net).keys()


@pytest.mark.parametrize("to", ["gv", "plain"])
def test_everything_else_is_carried_in_order(to):
    net = Net(lambda layer: in_form("original", layer))
    sd = net.state_dict()
    sd["steps"], sd["extra"] = 7, {"nested": [torch.ones(2)]}
    before = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in sd.items()}
    converted = convert_state_dict(sd, to)
    assert type(converted) is OrderedDict
    assert converted._metadata == sd._metadata
    names = [key.replace(".parametrizations", "").replace("original0", "g").replace("original1", "v") for key in sd]
    expected = [key.removesuffix(".g") if to == "plain" else key.replace("t.g", "t_g") for key in names]
    expected = [key.replace("t.v", "t_v") for key in expected if to == "gv" or not key.endswith(".v")]
    assert list(converted) == expected
    carried = [key for key in sd if "parametrizations" not in key]
    assert all(converted[key] is sd[key] for key in carried)
    assert all(torch.equal(value, before[key]) for key, value in sd.items() if isinstance(value, torch.Tensor))
    assert list(sd) == list(before)


def test_no_inference_tensors_and_no_graph_come_out():
    layer = in_form("gv", nn.Linear(3, 4))
    with torch.inference_mode():
        sd = convert_state_dict(layer.state_dict(keep_vars=True))
    assert not sd["weight"].is_inference()
    assert not sd["weight"].requires_grad


def test_meta_tensors_are_converted_shape_by_shape():
    with torch.device("meta"):
        net = nn.Sequential(Net(), nn.Linear(4, 4), nn.Linear(4, 4))
    sd = net.state_dict()
    converted = convert_state_dict(sd, "original", model=net)
    assert all(value.is_meta for value in converted.values())
    assert len({id(value) for value in converted.values()}) == len(converted)  # without memory, and yet not tied
    back = convert_state_dict(converted)
    assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in sd.items()}
