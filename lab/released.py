"""The checkpoint files that the papers' authors released -> our networks.

A script's --weights takes either its own last.pt or such a file; the latter comes here. Each
function, named like its script, takes the loaded state dict and the file's path (for the message),
reads all widths from the shapes and returns the network or networks, filled, on the CPU. A
`UserError` says what was expected where the file is none of these.
"""

import contextlib
import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import torch

from common import UserError, load_file


@contextlib.contextmanager
def expecting(path, what):
    """Turns what a wrong file raises inside into one `UserError`: "PATH: WHAT"."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        raise UserError(f"{path}: {what}") from None


@torch.no_grad()
def fill_by_order(net, tensors):
    """Copies tensors to a network's parameters by position; returns the network.

    Dimensions of 1 do not count: (1, C, 1, 1) fills (C). Raises ValueError where a shape or the
    number of tensors differs.
    """
    for p, t in zip(list(net.parameters()), tensors, strict=True):
        if p.squeeze().shape != t.squeeze().shape:
            raise ValueError(f"a layer of shape {tuple(t.shape)}, expected {tuple(p.shape)}")
        p.copy_(t.reshape(p.shape))
    return net


# ---- CycleGAN, CUT, SinCUT: one generator a file, its layers in the order of ours ---------------

# What their files keep beside the parameters: blur kernels, and the statistics that old versions of
# instance normalisation stored and never used.
EXTRA = ("filt", "kernel", "running_mean", "running_var", "num_batches_tracked")


def resnet_generator(make, state):
    """A ResNet generator of the CycleGAN or CUT repository -> make(ngf, blocks, antialias)."""
    blocks = sum(k.endswith("conv_block.1.weight") for k in state)
    net = make(len(state["model.1.weight"]), blocks, "model.7.filt" in state)
    return fill_by_order(net, [v for k, v in state.items() if not k.endswith(EXTRA)])


def cyclegan(state, path):
    """latest_net_G_A.pth, or horse2zebra.pth and the like -> G; one file holds one direction."""
    from cyclegan import ResnetGenerator

    with expecting(path, "neither a checkpoint of cyclegan.py nor a generator released by the "
                         "authors (latest_net_G_A.pth)"):
        return resnet_generator(ResnetGenerator, state)


def cut(state, path):
    """latest_net_G.pth of CUT or FastCUT -> G."""
    from cut import ResnetGenerator

    with expecting(path, "neither a checkpoint of cut.py nor a generator released by the authors "
                         "(latest_net_G.pth)"):
        return resnet_generator(ResnetGenerator, state)


def sincut(state, path):
    """latest_net_G.pth of SinCUT -> G."""
    from sincut import SinGenerator

    with expecting(path, "neither a checkpoint of sincut.py nor a generator released by the "
                         "authors (latest_net_G.pth)"):
        net = SinGenerator(len(state["encoder.convs.1.0.weight"]) // 8)
        return fill_by_order(net, [v for k, v in state.items() if not k.endswith(EXTRA)])


# ---- INIT: MUNIT's generators, two in a file ----------------------------------------------------


def init(state, path):
    """MUNIT's gen_*.pt -> {"E_X": encoder, "G_X": decoder, "E_Y": ..., "G_Y": ...}.

    Left out are the statistics that old instance normalisations and all AdaIN layers keep in the
    file and never use.
    """
    from init import Decoder, Encoder

    def pair(theirs):
        theirs = {k: v for k, v in theirs.items() if ".running_" not in k}
        blocks = sum(k.startswith("enc_content.model.3.") and k.endswith("0.conv.weight")
                     for k in theirs)
        widths = (len(theirs["enc_content.model.0.conv.weight"]),
                  len(theirs["enc_style.model.6.weight"]), blocks)

        def filled(net, names):
            return fill_by_order(net, [theirs.pop(f"{name}.{leaf}") for name in names for leaf in
                                       (("gamma", "beta") if "norm" in name else
                                        ("weight", "bias"))])

        def convs(part):
            return [f"{part}.model.{b}.model.{i}.conv" for b in range(blocks) for i in (0, 1)]

        E = filled(Encoder(*widths), [
            *(f"enc_content.model.{i}.conv" for i in range(3)), *convs("enc_content.model.3"),
            *(f"enc_style.model.{i}.conv" for i in range(5)), "enc_style.model.6"])
        G = filled(Decoder(*widths), [
            *(f"mlp.model.{i}.fc" for i in range(3)), *convs("dec.model.0"), "dec.model.2.conv",
            "dec.model.2.norm", "dec.model.4.conv", "dec.model.4.norm", "dec.model.5.conv"])
        if theirs:
            raise ValueError("more layers")
        return E, G

    with expecting(path, "neither a checkpoint of init.py nor the generators of MUNIT (gen_*.pt)"):
        (E_X, G_X), (E_Y, G_Y) = pair(state["a"]), pair(state["b"])
        return {"E_X": E_X, "G_X": G_X, "E_Y": E_Y, "G_Y": G_Y}


# ---- Swapping Autoencoder: everything in one file, under other names ----------------------------

# Their names -> ours. Blocks of a list are numbered in their order (theirs by resolution).
SWAPAE_LAYERS = {
    "E.FromRGB": "E.from_rgb", "E.ToSpatialCode": "E.to_structure",
    "E.ToGlobalCode.0": "E.to_texture", "G.SpatialCodeModulation.scale": "G.scale",
    "G.SpatialCodeModulation.bias": "G.shift", "G.ToRGB": "G.to_rgb",
    "D.stylegan2_D.convs.0": "D.from_rgb", "D.stylegan2_D.final_conv": "D.last",
    "D.stylegan2_D.final_linear": "D.dense", "Dpatch.convs.0": "D_patch.from_rgb",
    "Dpatch.convs.5": "D_patch.block", "Dpatch.convs.6": "D_patch.last",
    "Dpatch.pairlinear": "D_patch.dense"}
SWAPAE_LISTS = {
    r"E\.DownToSpatialCode\.\w+": "E.down", r"E\.DownToGlobalCode\.\w+": "E.pool",
    r"G\.\w+Block\d+": "G.blocks", r"D\.stylegan2_D\.convs\.\w+": "D.down",
    r"Dpatch\.convs\.\w+": "D_patch.down"}


def swapae_names(state):
    """The authors' state dict -> {our name, with "E." and so on before it: tensor}.

    Their filters and their counter are left out; additional dimensions of 1 are dropped.
    """
    ours, seen = {}, {}
    for key, value in state.items():
        if key.endswith("kernel") or "." not in key:
            continue
        for theirs, name in SWAPAE_LAYERS.items():
            if key.startswith(theirs + "."):
                key = name + key[len(theirs):]
        for theirs, name in SWAPAE_LISTS.items():
            if match := re.match(theirs, key):
                blocks = seen.setdefault(name, [])
                blocks += [match[0]] * (match[0] not in blocks)
                key = f"{name}.{blocks.index(match[0])}{key[match.end():]}"
        key = re.sub(r"\.(conv\.)?modulation\.", ".style.", key)
        key = re.sub(r"\.(Conv|Act|conv|activate)\.(?=weight|bias)", ".", key)
        key = key.replace(".noise.weight", ".noise")
        ours[key] = (value[0] if value.dim() == 5 else value.flatten() if value.dim() == 4 and
                     key.endswith("bias") else value)
    return ours


def swapae(state, path):
    """The file of a released model (E, G and both discriminators) -> E, G."""
    from swapae import Encoder, Generator

    with expecting(path, "neither a checkpoint of swapae.py nor one released by the authors (a "
                         "state_dict with E. and G.)"):
        ours = swapae_names(state)

        def widths(kind, layer):
            keys = (f"{kind}.{i}{layer}.weight" for i in range(99))
            return [len(ours[key]) for key in itertools.takewhile(ours.__contains__, keys)]

        down, blocks = widths("E.down", ".conv2"), widths("G.blocks", ".conv1")
        structure, texture = ours["E.to_structure.1.weight"], ours["E.to_texture.weight"]
        codes, head = (len(structure), len(texture)), len(blocks) - len(down)
        E = Encoder([len(ours["E.from_rgb.weight"]), *down, *widths("E.pool", "")],
                    len(down), *codes)
        G = Generator(blocks[:head], blocks[head:], *codes)
        for name, net in (("E.", E), ("G.", G)):
            net.load_state_dict({k[2:]: v for k, v in ours.items() if k.startswith(name)})
        return E, G


# ---- SPADE: G and E under other names; sizes and flags follow from the shapes --------------------

SPADE_NAMES = [  # theirs -> ours, for G and E
    (r"^head_0", "head"), (r"^G_middle", "middle"), (r"^conv_img", "to_rgb"),
    (r"norm_([01s])\.param_free_norm", r"spade_\1.norm"),
    (r"norm_([01s])\.mlp_shared\.0", r"spade_\1.shared"), (r"norm_([01s])\.mlp_", r"spade_\1."),
    (r"^fc_mu", "mu"), (r"^fc_var", "logvar"),
    (r"^layer(\d)", lambda found: f"layers.{int(found[1]) - 1}"),
    (r"weight_orig$", "parametrizations.weight.original"),
    (r"weight_([uv])$", r"parametrizations.weight.0._\1")]


def spade_names(state):
    """A state dict of theirs under our names."""
    renamed = {}
    for key, value in state.items():
        for pattern, name in SPADE_NAMES:
            key = re.sub(pattern, name, key)
        renamed[key] = value
    return renamed


def filled(net, state):
    """The network with their state; what counts batches is missing in files of old versions."""
    tracked = {k: v for k, v in net.state_dict().items() if k.endswith("num_batches_tracked")}
    net.load_state_dict(tracked | spade_names(state))
    return net


def spade(state, path, args):
    """latest_net_G.pth -> networks G, and E from latest_net_E.pth beside it if G takes its z. What
    the shapes tell is written to the flags `args`."""
    from spade import KINDS, Encoder, generator, m_channels

    nets, beside = SimpleNamespace(), Path(path).with_name("latest_net_E.pth")
    with expecting(path, "neither a checkpoint of spade.py nor a generator released by the authors "
                         "(latest_net_G.pth), or of another --size"):
        first, fc = state["head_0.norm_0.mlp_shared.0.weight"], state["fc.weight"]
        channels, args.kernel, args.hidden = first.shape[1], first.shape[2], first.shape[0]
        args.ngf = len(state["head_0.conv_0.bias"]) // 16
        args.doublings = 7 if "up_4.conv_0.bias" in state else args.doublings
        args.input, args.z = ("encoder", fc.shape[1]) if fc.dim() == 2 else ("segmap", args.z)
        if args.labels is None or m_channels(args) != channels:
            known = {151: "ade20k", 36: "cityscapes", 184: "coco"}.get(channels)
            preset = KINDS.get(known, {"labels": channels})
            vars(args).update({"unlabelled": [], "edges": False} | preset)
            print(f"{path}: {channels} channels of labels"
                  + (f", taken for {known}'s" if known else ""))
        nets.G = filled(generator(args), state)
    if args.input == "encoder" and beside.exists():
        state = load_file(beside)
        with expecting(beside, "not an encoder released by the authors (latest_net_E.pth)"):
            side = 2 ** (2 + sum(k.endswith("weight_orig") for k in state))
            width = len(state["layer1.0.weight_orig"])
            nets.E = filled(Encoder(width, len(state["fc_mu.bias"]), side), state)
    return nets


# ---- pix2pixSC: pix2pixHD's generator, its layers in the order of ours --------------------------


def pix2pixsc(state, path, args):
    """latest_net_G.pth for --label-kind -> G; args.labels is set to what the file has (23: poses).
    """
    from pix2pixsc import FACE_CURVES, Generator

    with expecting(path, "neither a checkpoint of pix2pixsc.py nor a generator of the authors "
                         f"(latest_net_G.pth) for --label-kind {args.label_kind}"):
        width, channels = state["model.1.weight"].shape[:2]
        blocks = sum(k.endswith("conv_block.1.weight") for k in state)
        downs = (len(state) - 4 - 4 * blocks) // 4
        args.labels = (channels - 3) // 2
        if args.label_kind == "landmarks" and args.labels != 1 + len(FACE_CURVES):
            raise ValueError("not the faces' generator")
        return fill_by_order(Generator(args.labels, width, downs, blocks), state.values())
