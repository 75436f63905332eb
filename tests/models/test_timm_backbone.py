"""timm backbones: block outputs, preprocessing and weights are those of the network itself."""

import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file

from latentddae.core.errors import ConfigError, DataError
from latentddae.models.timm_backbone import BackboneTrunk, open_backbone

NAME = "test_vit"  # timm's own tiny network: 160 pixels, 6 blocks


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(1)
    return timm.create_model(NAME, num_classes=0).eval()


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(network.state_dict(), path)
    return path


def images(size=160):
    return torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def outputs(model, x, depth):
    with torch.inference_mode():
        return dict(BackboneTrunk(model, depth, torch.float32).stream(x))


def test_blocks_are_those_of_forward_hooks(network, weights):
    model = open_backbone(f"timm:{NAME}@{weights}").model
    hooked, ran = {}, []
    hooks = [
        block.register_forward_hook(lambda _m, _i, y, k=k: hooked.update({k: y}))
        for k, block in enumerate(network.blocks, start=1)
    ]
    with torch.inference_mode():
        network(model.preprocess(images()))
    for hook in hooks:
        hook.remove()
    model.network.blocks[3].register_forward_hook(lambda *_: ran.append(4))
    ours = outputs(model, images(), 3)
    assert list(ours) == [1, 2, 3]
    assert ran == []  # no block after the deepest runs
    for k, output in ours.items():
        torch.testing.assert_close(output.prefix, hooked[k][:, :1])
        torch.testing.assert_close(output.tokens(), hooked[k][:, 1:])


def test_preprocessing_is_timms(weights):
    model = open_backbone(f"timm:{NAME}@{weights}").model
    settings = timm.data.resolve_model_data_config(model.network)
    transform = timm.data.create_transform(**settings, is_training=False)
    mean, std = torch.tensor(settings["mean"]), torch.tensor(settings["std"])
    expected = ((images() + 1) / 2 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(model.preprocess(images()), expected)
    torch.testing.assert_close(transform.transforms[-1].mean, mean)
    assert model.preprocess(images(64)).shape == (3, 3, *settings["input_size"][1:])


def test_weights_of_all_kinds_of_files(network, weights, tmp_path):
    plain = open_backbone(f"timm:{NAME}@{weights}").model.state_dict()
    state = network.state_dict()
    for wrapped in (state, {"model": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}):
        torch.save({**wrapped}, tmp_path / "w.pth")
        ours = open_backbone(f"timm:{NAME}@{tmp_path / 'w.pth'}").model.state_dict()
        assert all(ours[key].equal(plain[key]) for key in plain)
    extra = {**state, "head.weight": torch.ones(2, 2)}  # a classifier that we do not want
    torch.save(extra, tmp_path / "w.pth")
    assert open_backbone(f"timm:{NAME}@{tmp_path / 'w.pth'}").model.config.depth == 6


def test_random_weights_are_the_same_every_time_and_touch_no_global_state():
    before = torch.get_rng_state()
    one, two = (open_backbone(f"timm:{NAME}@random").model.state_dict() for _ in range(2))
    assert all(one[key].equal(two[key]) for key in one)
    assert torch.get_rng_state().equal(before)


def test_a_network_of_stages_has_blocks_too():
    checkpoint = open_backbone("timm:test_resnet@random")
    stages = outputs(checkpoint.model, images(), 2)
    assert list(stages) == [1, 2]
    assert stages[2].prefix is None
    with pytest.raises(ConfigError, match="no final LayerNorm"):
        BackboneTrunk(checkpoint.model, 2, torch.float32).normalised(2, stages[2].tokens())


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_refused(network, tmp_path, capsys):
    for source, error, match in (
        (f"timm:{NAME}", ConfigError, "which weights"),
        ("timm:no_such_net@random", ConfigError, "no_such_net"),
        (f"timm:{NAME}@{tmp_path / 'none.pth'}", ConfigError, "do not exist"),
        ("timm:vit_tiny_patch16_224@{}", ConfigError, "another network|lacks"),
    ):
        torch.save(network.state_dict(), tmp_path / "small.pth")
        with pytest.raises(error, match=match):
            open_backbone(source.format(tmp_path / "small.pth"))
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil(), protocol=2))
    torch.save({"model": Evil()}, tmp_path / "evil2.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    for name in ("evil.pth", "evil2.pth", "cut.safetensors"):
        with pytest.raises(DataError, match="tensors alone"):
            open_backbone(f"timm:{NAME}@{tmp_path / name}")
    assert "code ran" not in capsys.readouterr().out
