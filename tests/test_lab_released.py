"""lab/released.py: the authors' files, by their own naming rules, fill our networks."""

import math

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

import common
import cut
import cyclegan
import init
import spade
import swapae
from lab import released

CPU = torch.device("cpu")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_fill_by_order_compares_shapes_but_for_ones():
    net = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Linear(3, 4))
    tensors = [torch.randn(p.shape, generator=rng()) for p in net.parameters()]
    tensors[1] = tensors[1].view(1, 3, 1, 1)
    assert released.fill_by_order(net, tensors) is net
    for p, t in zip(net.parameters(), tensors, strict=True):
        assert torch.equal(p, t.view_as(p))
    with pytest.raises(ValueError, match="of shape .4, 2., expected .4, 3."):
        released.fill_by_order(net, [*tensors[:2], torch.zeros(4, 2), tensors[3]])
    for wrong in (tensors[:3], [*tensors, torch.zeros(1)]):
        with pytest.raises(ValueError):
            released.fill_by_order(net, wrong)


@pytest.mark.parametrize("read", [released.cut, released.cyclegan, released.init, released.swapae])
@pytest.mark.parametrize("state", [{}, {"a": torch.zeros(1)}, [1], None,
                                   {"model.1.weight": torch.zeros(())}, {"a": {}, "b": {}}])
def test_other_files_are_refused_by_name(read, state):
    name = read.__name__
    with pytest.raises(common.UserError, match=f"x.pth: neither a checkpoint of {name}.py nor"):
        read(state, "x.pth")


# ---- CycleGAN, CUT, SinCUT ----------------------------------------------------------------------


def resnet_state(G, antialias=False, statistics=False):
    """G's weights under the keys of the authors' generators, blur kernels included."""
    convs = [layer for layer in G.modules() if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))]
    blocks = (len(convs) - 6) // 2
    first, down = (12, [1, 4, 8]) if antialias else (10, [1, 4, 7])
    body = [f"{first + b}.conv_block.{i}" for b in range(blocks) for i in (1, 5)]
    after = first + blocks  # 21 for nine anti-aliased blocks
    up = [after + 1, after + 5, after + 9] if antialias else [after, after + 3, after + 7]
    state = {}
    for name, conv in zip([*down, *body, *up], convs, strict=True):
        state[f"model.{name}.weight"], state[f"model.{name}.bias"] = conv.weight, conv.bias
        if antialias and name in (4, 8):
            state[f"model.{name + 3}.filt"] = torch.ones(conv.out_channels, 1, 3, 3)
        if statistics and name == 1:
            state["model.2.running_mean"] = torch.zeros(conv.out_channels)
            state["model.2.running_var"] = torch.ones(conv.out_channels)
    return {key: value.detach().clone() for key, value in state.items()}


@pytest.mark.parametrize("script", [cut, cyclegan])
def test_key_names_of_nine_blocks(script):
    keys = resnet_state(script.ResnetGenerator(antialias=True), antialias=True).keys()
    assert {"model.1.weight", "model.7.filt", "model.11.filt", "model.12.conv_block.1.weight",
            "model.20.conv_block.5.bias", "model.22.weight", "model.26.bias",
            "model.30.weight"} < keys
    keys = resnet_state(script.ResnetGenerator(antialias=False)).keys()
    assert {"model.1.weight", "model.7.weight", "model.10.conv_block.1.weight",
            "model.18.conv_block.5.bias", "model.19.weight", "model.22.bias",
            "model.26.weight"} < keys


@pytest.mark.parametrize("antialias, statistics", [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("script", [cut, cyclegan])
def test_loads_generators_of_cyclegan_and_cut(tmp_path, script, antialias, statistics):
    G = script.ResnetGenerator(4, 3, antialias)
    path = tmp_path / "latest_net_G.pth"
    torch.save(resnet_state(G, antialias, statistics), path)
    args = script.get_args(["--data", ".", "--weights", str(path), "--device", "cpu"])
    loaded = script.load_generator(args, CPU)
    x = torch.randn(1, 3, 32, 32)
    for a, b in zip(loaded.state_dict().values(), G.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(script.translate(loaded, x, args), script.translate(G, x, args))


def test_loads_the_sincut_generator():
    sincut = pytest.importorskip("sincut")
    G = sincut.SinGenerator(1)
    for p in G.parameters():
        nn.init.normal_(p)
    names = ["encoder.convs.1.0.weight", "encoder.convs.1.1.bias"]
    down = ["conv1.0.weight", "conv1.1.bias", "conv2.0.kernel", "conv2.1.weight", "conv2.2.bias",
            "skip.0.kernel", "skip.1.weight"]
    flat = ["conv1.0.weight", "conv1.1.bias", "conv2.0.weight", "conv2.1.bias"]
    names += [f"encoder.convs.2.{n}" for n in down]
    names += [f"{half}.convs.{i}.{n}" for half, ids in (("encoder", (3, 4, 5)),
                                                        ("decoder", (0, 1, 2)))
              for i in ids for n in flat]
    names += ["decoder.convs.3.conv.weight", "decoder.convs.3.conv.blur.kernel",
              "decoder.convs.3.noise.weight", "decoder.convs.3.activate.bias",
              "decoder.convs.4.0.weight", "decoder.convs.4.1.bias"]
    state, values = {}, iter(G.parameters())
    for name in names:
        value = torch.ones(4, 4) if "kernel" in name else next(values).detach()
        if "bias" in name:
            value = value.view(1, -1, 1, 1)
        state[name] = value[None] if name == "decoder.convs.3.conv.weight" else value
    loaded = released.sincut(state, "latest_net_G.pth")
    for a, b in zip(loaded.parameters(), G.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(common.UserError, match="neither a checkpoint of sincut.py nor"):
        released.sincut({"model.1.weight": torch.zeros(1)}, "x.pth")


# ---- INIT ---------------------------------------------------------------------------------------


def munit_state(E, G, old=False):
    """The weights of E and G under MUNIT's keys, written down from the layout of its gen_*.pt."""
    state = {}

    def put(name, layer):
        leaves = ("gamma", "beta") if isinstance(layer, init.LayerNorm) else ("weight", "bias")
        state.update({f"{name}.{leaf}": getattr(layer, leaf).detach().clone() for leaf in leaves})

    for i in range(5):
        put(f"enc_style.model.{i}.conv", E.style[2 * i])
    put("enc_style.model.6", E.style[11])
    for i in range(3):
        put(f"enc_content.model.{i}.conv", E.content[3 * i])
    for b, block in enumerate(G.blocks):
        body = E.content[9 + b].body
        for i, layer in enumerate((body[1], body[5])):
            put(f"enc_content.model.3.model.{b}.model.{i}.conv", layer)
            if old:
                state[f"enc_content.model.3.model.{b}.model.{i}.norm.running_mean"] = torch.ones(1)
        for i, layer in enumerate((block.conv1, block.conv2)):
            name = f"dec.model.0.model.{b}.model.{i}"
            state |= {f"{name}.norm.running_{k}": torch.ones(1) for k in ("mean", "var")}
            put(f"{name}.conv", layer)
    for i, k in ((2, 1), (4, 5)):
        put(f"dec.model.{i}.norm", G.up[k + 1])
        put(f"dec.model.{i}.conv", G.up[k])
    put("dec.model.5.conv", G.up[8])
    for i in range(3):
        put(f"mlp.model.{i}.fc", G.mlp[2 * i])
    return state


def test_munit_layout_at_full_width():
    state = munit_state(init.Encoder(), init.Decoder())
    assert len(state) == 82 and sum("running" not in k for k in state) == 66
    assert state["mlp.model.2.fc.weight"].shape == (4096, 256)
    assert state["enc_style.model.6.weight"].shape == (8, 256, 1, 1)


@pytest.mark.parametrize("old", [False, True])
def test_loads_munits_generators(tmp_path, old):
    pairs = {k: (init.Encoder(4, 5, 2), init.Decoder(4, 5, 2)) for k in "ab"}
    torch.save({k: munit_state(*pair, old) for k, pair in pairs.items()}, tmp_path / "gen.pt")
    args = init.get_args(["--data", ".", "--weights", str(tmp_path / "gen.pt")])
    nets = init.load_networks(args, CPU)
    x, s = torch.rand(1, 3, 32, 32), torch.randn(1, 5)
    for E, G, (theirs_E, theirs_G) in ((nets.E_X, nets.G_X, pairs["a"]),
                                       (nets.E_Y, nets.G_Y, pairs["b"])):
        for ours, theirs in zip(E(x), theirs_E(x), strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(G(E.content(x), s), theirs_G(E.content(x), s))
    assert args.style_dim == 5
    Image.fromarray(np.zeros((40, 48, 3), np.uint8)).save(tmp_path / "0.png")
    init.main(["--translate", str(tmp_path / "0.png"), "--weights", str(tmp_path / "gen.pt"),
               "--styles", "2", "--out", str(tmp_path / "out")])
    assert Image.open(tmp_path / "out/0.png").size == (96, 40)


# ---- Swapping Autoencoder ------------------------------------------------------------------------


def swapae_layout(size=256, downs=4, texture=2048, e=None, g=None, patch=128):
    """{name: shape} of the authors' state_dict, from their naming rules."""
    e = e or [32, 64, 128, 256, 512, 1024, 2048]
    g = g or [256, 512, 512, 512, 256, 128]                  # two head blocks, four upsampling
    found = {}

    def conv(name, a, b, k=3, act=True, blur=None, bias=False):
        if blur:
            found[f"{name}.Blur.kernel"] = (blur, blur)
        found[f"{name}.Conv.weight"] = (b, a, k, k)
        if act:
            found[f"{name}.Act.bias"] = (b,)
        if bias:
            found[f"{name}.Conv.bias"] = (b,)

    def down(name, a, b, blur):
        conv(f"{name}.conv1", a, a)
        conv(f"{name}.conv2", a, b, blur=blur)
        conv(f"{name}.skip", a, b, 1, act=False, blur=blur)

    def linear(name, a, b):
        found[f"{name}.weight"], found[f"{name}.bias"] = (b, a), (b,)

    conv("E.FromRGB", 3, e[0], 1)
    for i in range(downs):
        down(f"E.DownToSpatialCode.ResBlockDownBy{2 ** i}", e[i], e[i + 1], 3)
    conv("E.ToSpatialCode.0", e[downs], e[downs], 1)
    conv("E.ToSpatialCode.1", e[downs], 8, 1, act=False, bias=True)
    for i in (downs, downs + 1):
        conv(f"E.DownToGlobalCode.ConvLayerDownBy{2 ** i}", e[i], e[i + 1], blur=1)
    linear("E.ToGlobalCode.0", e[-1], texture)

    def styled(name, a, b, up=False):
        found[f"{name}.conv.weight"] = (1, b, a, 3, 3)
        if up:
            found[f"{name}.conv.blur.kernel"] = (4, 4)
        linear(f"{name}.conv.modulation", texture, a)
        found[f"{name}.noise.weight"], found[f"{name}.activate.bias"] = (1,), (b,)

    for name in ("scale", "bias"):
        linear(f"G.SpatialCodeModulation.{name}", texture, 8)
    for i, (a, b) in enumerate(zip([8, *g], g, strict=False)):
        name = f"G.HeadResnetBlock{i}" if i < 2 else f"G.UpsamplingResBlock{2 ** (i + 2)}"
        styled(f"{name}.conv1", a, b, i >= 2)
        styled(f"{name}.conv2", b, b)
        if i < 2 or a != b:
            conv(f"{name}.skip", a, b, 1, act=i >= 2)
    found |= {"G.ToRGB.bias": (1, 3, 1, 1), "G.ToRGB.upsample.kernel": (4, 4),
              "G.ToRGB.conv.weight": (1, 3, g[-1], 1, 1)}
    linear("G.ToRGB.conv.modulation", texture, g[-1])
    levels = range(round(math.log2(size)), 1, -1)
    d = [min(512, 2 ** (15 - i)) for i in levels]
    conv("D.stylegan2_D.convs.0", 3, d[0], 1)
    for i, a, b in zip(levels, d, d[1:], strict=False):
        name = f"{2 ** i}x{2 ** i}" if i > 8 else 9 - i
        down(f"D.stylegan2_D.convs.{name}", a, b, 4)
    conv("D.stylegan2_D.final_conv", 512, 512)
    linear("D.stylegan2_D.final_linear.0", 512 * (4 * size // 2 ** levels[0]) ** 2, 512)
    linear("D.stylegan2_D.final_linear.1", 512, 1)
    levels = range(round(math.log2(patch)), 1, -1)
    p = [min(384, 2 ** (12 - i)) for i in levels]
    conv("Dpatch.convs.0", 3, p[0])
    for i, a, b in zip(levels, p, p[1:], strict=False):
        down(f"Dpatch.convs.{f'{2 ** i}x{2 ** i}' if i > 6 else 7 - i}", a, b, 4)
    conv("Dpatch.convs.5.conv1", 384, 384)
    conv("Dpatch.convs.5.conv2", 384, 768)
    conv("Dpatch.convs.5.skip", 384, 768, 1, act=False)
    conv("Dpatch.convs.6", 768, 384)
    for i, (a, b) in enumerate(((3072, 2048), (2048, 2048), (2048, 1024), (1024, 1))):
        linear(f"Dpatch.pairlinear.{i}", a, b)
    found["num_discriminator_iters"] = (1,)
    return found


BIG = {"size": 768, "downs": 5, "texture": 1536, "patch": 256,
       "e": [13, 26, 51, 102, 205, 410, 819, 1536], "g": [204, 409, 409, 409, 409, 204, 102]}


@pytest.mark.parametrize("setting, layout, entries", [
    ("256", {}, (42, 79, 50, 52)), ("512", {"size": 512}, (42, 79, 57, 52)), ("1024", BIG, None)])
def test_swapae_names_and_shapes_are_ours(setting, layout, entries):
    with torch.device("meta"):
        m = swapae.build(swapae.get_args(["--data", ".", "--setting", setting]),
                         torch.device("meta"))
    theirs = {k: torch.empty(v, device="meta") for k, v in swapae_layout(**layout).items()}
    if entries:
        prefixes = ("E.", "G.", "D.", "Dpatch.")
        assert entries == tuple(sum(k.startswith(p) for k in theirs) for p in prefixes)
    found = {k: tuple(v.shape) for k, v in released.swapae_names(theirs).items()}
    assert found == {f"{name}.{k}": tuple(p.shape) for name in ("E", "G", "D", "D_patch")
                     for k, p in getattr(m, name).named_parameters()}


def small_release(texture=24, last=24):
    shapes = swapae_layout(e=[2, 3, 4, 5, 6, 8, last], g=[8, 10, 10, 9, 8, 7], texture=texture)
    return {k: torch.randn(v, generator=rng(i)) for i, (k, v) in enumerate(shapes.items())}


def test_swapae_file_translates(tmp_path):
    """E and G alone, as in the released archives; the last width may exceed the texture code."""
    state = {k: v for k, v in small_release(last=26).items() if k[:2] in ("E.", "G.")}
    torch.save(state, tmp_path / "latest_checkpoint.pth")
    args = swapae.get_args(["--weights", str(tmp_path / "latest_checkpoint.pth"), "--device",
                            "cpu", "--data", "."])
    m = swapae.load_networks(args, CPU)
    assert torch.equal(m.E.down[2].conv2.bias, state["E.DownToSpatialCode.ResBlockDownBy4.conv2."
                                                     "Act.bias"])
    assert torch.equal(m.G.blocks[3].conv1.weight,
                       state["G.UpsamplingResBlock32.conv1.conv.weight"][0])
    assert torch.equal(m.G.shift.weight, state["G.SpatialCodeModulation.bias.weight"])
    assert torch.equal(m.G.to_rgb.bias, state["G.ToRGB.bias"].flatten())
    x = torch.rand(1, 3, 130, 100) * 2 - 1
    assert swapae.swap(m, x, x, args).shape == x.shape
    for name, spoil in (("half", lambda s: s.pop("G.ToRGB.bias")),
                        ("wrong", lambda s: s.update({"G.ToRGB.bias": torch.zeros(4)}))):
        broken = dict(state)
        spoil(broken)
        torch.save(broken, tmp_path / name)
        with pytest.raises(common.UserError, match="nor one released"):
            released.swapae(broken, tmp_path / name)


# ---- SPADE --------------------------------------------------------------------------------------


def spade_state(net):
    """A state dict as the authors' code saves it: old spectral norm, their names."""
    state = {}
    for key, value in net.state_dict().items():
        key = key.replace("parametrizations.weight.original", "weight_orig").replace(
            "parametrizations.weight.0._", "weight_")
        for ours, theirs in (("head.", "head_0."), ("middle_", "G_middle_"), (
                "to_rgb", "conv_img"), ("spade_", "norm_"), (".norm.", ".param_free_norm."), (
                ".shared.", ".mlp_shared.0."), (".gamma.", ".mlp_gamma."), (
                ".beta.", ".mlp_beta.")):
            key = key.replace(ours, theirs)
        if key.startswith(("mu.", "logvar.")):
            key = key.replace("mu.", "fc_mu.").replace("logvar.", "fc_var.")
        for i in range(6):
            key = key.replace(f"layers.{i}.", f"layer{i + 1}.")
        state[key] = value
    return state


@pytest.mark.parametrize("tracked", [True, False])
def test_spade_files_load(tmp_path, tracked):
    """The authors' layout with its own names; the picture is the one that the same weights paint
    when they are ours."""
    flags = ["--data", ".", "--labels", "4", "--size", "32", "--doublings", "4", "--device", "cpu"]
    args = spade.get_args([*flags, "--input", "encoder", "--ngf", "2", "--ndf", "2", "--hidden",
                           "6", "--z", "5", "--lambda-vgg", "0", "--batch", "2"])
    nets = spade.build(args, CPU)
    states = {name: spade_state(getattr(nets, name)) for name in "GE"}
    assert {"head_0.conv_0.weight_u", "up_3.norm_s.param_free_norm.running_var", "fc_mu.weight",
            "up_0.norm_s.mlp_beta.bias", "conv_img.weight", "layer2.0.weight_v"} <= {
                *states["G"], *states["E"]}
    for name, state in states.items():
        torch.save({k: v for k, v in state.items() if tracked or "num_batches" not in k},
                   tmp_path / f"latest_net_{name}.pth")
    given = spade.get_args([*flags, "--weights", str(tmp_path / "latest_net_G.pth")])
    loaded = spade.load_networks(given, CPU)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    test = torch.randint(0, 4, (2, 32, 32)), torch.zeros(2, 0, 32, 32), x
    ours, theirs = (spade.answers(n, test, a) for n, a in ((nets, args), (loaded, given)))
    for name, picture in ours.items():
        torch.testing.assert_close(theirs[name], picture, rtol=1e-5, atol=1e-6)
    torch.save({"x": torch.zeros(3)}, tmp_path / "latest_net_G.pth")
    with pytest.raises(common.UserError, match="neither a checkpoint"):
        spade.load_networks(given, CPU)


def test_spade_key_names():
    """Ours, renamed, are the 234 keys of their COCO-Stuff generator and the 22 of an encoder."""
    args = spade.get_args(["--data", "coco"])
    with torch.device("meta"):
        G, E = spade.generator(args), spade.Encoder()
    for net, n in ((G, 234), (E, 22)):
        theirs = spade_state(net)
        assert len(theirs) == n
        assert {k: v.shape for k, v in released.spade_names(theirs).items()} == {
            k: v.shape for k, v in net.state_dict().items()}
