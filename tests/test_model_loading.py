"""Loading models by name: what comes back, what is refused and why, and when two models are the same."""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import xaifast
from xaifast.models import MLP, ConvNet, VisionTransformer, load_model, save_model

transformers = pytest.importorskip("transformers")


# ---- Hugging Face


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A directory with a small ViT and its processor."""
    directory = tmp_path_factory.mktemp("vit")
    write_vit(directory, id2label={0: "cat", 1: "dog", 2: "eel"})
    write_processor(directory, size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7])
    return directory


@pytest.fixture
def vit(original, tmp_path):
    return shutil.copytree(original, tmp_path / "vit")


def vit_config(**options):
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=3)
    return transformers.ViTConfig(**{**sizes, "image_size": 32, "patch_size": 8, **options})


def write_vit(directory, **options):
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(vit_config(**options))
    model.save_pretrained(directory)
    return model


def write_processor(directory, **options):
    from transformers.models.vit import image_processing_pil_vit

    image_processing_pil_vit.ViTImageProcessorPil(**options).save_pretrained(directory)


def test_huggingface(vit):
    torch.manual_seed(0)
    wanted = transformers.ViTForImageClassification(vit_config()).eval()
    loaded = load_model(f"hf:{vit}")
    assert not loaded.forward.training
    assert loaded.class_names == ["cat", "dog", "eel"]
    assert (loaded.input_size, loaded.patch_size, loaded.feature_names) == ((32, 32), 8, None)
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.forward(x).logits, wanted(x).logits)


def test_preprocessing_is_the_processors(vit):
    loaded = load_model(f"hf:{vit}")
    pixels = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    got = loaded.preprocess([Image.fromarray(pixels), pixels])
    small = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR))
    wanted = torch.tensor((small / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]).permute(2, 0, 1).float()
    assert got.shape == (2, 3, 32, 32) and got.dtype == torch.float32
    torch.testing.assert_close(got, wanted.expand(2, -1, -1, -1), atol=1e-5, rtol=0)
    json.dumps(loaded.preprocessing)
    assert loaded.preprocessing["image_mean"] == [0.1, 0.2, 0.3] and loaded.preprocessing["mode"] == "RGB"


def test_grey_and_narrow_images_become_rgb(vit):
    preprocess = load_model(f"hf:{vit}").preprocess
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    rgb = np.repeat(grey[..., None], 3, 2)
    for item in (grey, Image.fromarray(grey), rgb, Image.fromarray(rgb).convert("RGBA")):
        assert torch.equal(preprocess([item]), preprocess([Image.fromarray(rgb)]))
    assert preprocess([np.zeros((3, 50, 3), np.uint8)]).shape == (1, 3, 32, 32)  # height 3 is not taken for channels


def test_grey_model(tmp_path):
    write_vit(tmp_path, num_channels=1)
    write_processor(tmp_path, size={"height": 32, "width": 32}, image_mean=[0.5], image_std=[0.5])
    loaded = load_model(f"hf:{tmp_path}")
    x = loaded.preprocess([Image.new("RGB", (5, 9), "white"), np.zeros((7, 7), np.uint8)])
    assert x.shape == (2, 1, 32, 32) and x[0].eq(1).all() and x[1].eq(-1).all()
    assert loaded.class_names is None  # LABEL_0, LABEL_1, ... say nothing


def test_normalisation_that_is_off_is_not_described(tmp_path):
    write_vit(tmp_path)
    write_processor(tmp_path, size={"height": 32, "width": 32}, do_normalize=False)
    assert load_model(f"hf:{tmp_path}").preprocessing["image_mean"] is None


@pytest.mark.parametrize("size", [48, 16])
def test_wrong_size_is_refused(vit, size):
    write_processor(vit, size={"height": size, "width": size})
    with pytest.raises(ValueError, match=f"{size} x {size} .image processor. and 32 x 32 .config"):
        load_model(f"hf:{vit}")


def test_models_of_any_size_decide_themselves(tmp_path):
    config = transformers.ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2, image_size=64, num_labels=2)
    transformers.ConvNextForImageClassification(config).save_pretrained(tmp_path)
    write_processor(tmp_path, size={"height": 32, "width": 48})
    with pytest.warns(UserWarning, match="32 x 48 .* 64 x 64"):
        loaded = load_model(f"hf:{tmp_path}")
    assert loaded.input_size == (32, 48) and loaded.patch_size is None


def test_wrong_channels_are_refused(tmp_path):
    write_vit(tmp_path, num_channels=1)
    write_processor(tmp_path, size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    with pytest.raises(ValueError, match="1 channels .num_channels.*ViTImageProcessor"):
        load_model(f"hf:{tmp_path}")
    write_vit(tmp_path, num_channels=5)
    with pytest.raises(ValueError, match="takes 5"):
        load_model(f"hf:{tmp_path}")


def test_shape_keeping_processor_is_refused(vit):
    write_processor(vit, do_resize=False)
    with pytest.raises(ValueError, match="set size"):
        load_model(f"hf:{vit}")


def test_missing_processor(vit):
    (vit / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="must hold its image processor.*none that can be read.*save_pretrained"):
        load_model(f"hf:{vit}")


def test_processor_of_a_tokenizer(vit):
    tokenizer = '{"tokenizer_class": "BertTokenizer", "do_lower_case": true}'
    (vit / "preprocessor_config.json").write_text(tokenizer)
    with pytest.raises(ValueError, match="that of a BertTokenizer"):
        load_model(f"hf:{vit}")
    (vit / "preprocessor_config.json").rename(vit / "tokenizer_config.json")
    with pytest.raises(ValueError, match="got that of a text tokenizer"):
        load_model(f"hf:{vit}")


def test_other_architectures_are_refused(tmp_path):
    config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be an image classifier.*got BertForSequenceClassification"):
        load_model(f"hf:{tmp_path}")


def test_random_head_is_refused(vit):
    transformers.ViTModel(vit_config()).save_pretrained(vit)
    with pytest.raises(ValueError, match="2 are missing .classifier.bias, classifier.weight.*ViTModel"):
        load_model(f"hf:{vit}")


def test_code_of_the_model_is_not_run(vit):
    config = json.loads((vit / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config"}}
    (vit / "config.json").write_text(json.dumps(config))
    (vit / "evil.py").write_text(f"open({str(vit / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="without code of its own"):
        load_model(f"hf:{vit}")
    assert not (vit / "ran").exists()


def test_broken_files(vit):
    weights = (vit / "model.safetensors").read_bytes()
    (vit / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="weights .* cannot be read"):
        load_model(f"hf:{vit}")
    (vit / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="weights .* cannot be read"):
        load_model(f"hf:{vit}")
    (vit / "config.json").write_text("{")
    with pytest.raises(ValueError, match="must be a model of transformers"):
        load_model(f"hf:{vit}")


def test_loading_is_silent_and_leaves_no_traces(vit, capfd):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(f"hf:{vit}")
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_half_precision_weights_become_float32(vit):
    transformers.ViTForImageClassification.from_pretrained(vit, dtype=torch.bfloat16).save_pretrained(vit)
    loaded = load_model(f"hf:{vit}")
    assert {p.dtype for p in loaded.forward.parameters()} == {torch.float32}


def test_huggingface_fingerprint(vit, tmp_path):
    first = load_model(f"hf:{vit}").fingerprint
    config = json.loads((vit / "config.json").read_text())
    moved = shutil.copytree(vit, tmp_path / "moved")
    (moved / "config.json").write_text(json.dumps({**config, "transformers_version": "4.0", "_name_or_path": "x"}))
    assert load_model(f"hf:{moved}").fingerprint == first
    (moved / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    assert load_model(f"hf:{moved}").fingerprint != first
    model = transformers.ViTForImageClassification.from_pretrained(vit)
    model.classifier.bias.data[0] += 1e-6
    model.save_pretrained(vit)
    assert load_model(f"hf:{vit}").fingerprint != first


def test_clip_takes_its_vision_part(tmp_path):
    vision = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, patch_size=8)
    config = transformers.CLIPConfig(vision_config={**vision, "image_size": 32}, num_labels=2)
    transformers.CLIPForImageClassification(config).save_pretrained(tmp_path)
    write_processor(tmp_path, size={"height": 32, "width": 32})
    loaded = load_model(f"hf:{tmp_path}")
    assert loaded.patch_size == 8 and loaded.forward(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 2)


# ---- the user's own code


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module into the current directory; returns ``py:`` and its name."""
    monkeypatch.chdir(tmp_path)
    names = []

    def write(code):
        name = f"mine_{tmp_path.name}_{len(names)}"
        (tmp_path / f"{name}.py").write_text(f"import torch\nfrom torch import nn\n{code}")
        names.append(name)
        return f"py:{name}"

    yield write
    for name in names:
        sys.modules.pop(name, None)


FORWARDS = {
    "module": "make = nn.Linear(2, 3)",
    "function that makes a module": "def make():\n    return nn.Linear(2, 3)",
    "class": "class make(nn.Linear):\n    def __init__(self):\n        super().__init__(2, 3)",
    "function": "def make(x):\n    return x @ torch.ones(2, 3)",
    "function that makes a function": "def make():\n    return lambda x: x @ torch.ones(2, 3)",
    "defaults": "def make(n=3, **rest):\n    return nn.Linear(2, n)",
}


@pytest.mark.parametrize("name", FORWARDS)
def test_user_models(module, name):
    loaded = load_model(f"{module(FORWARDS[name])}:make")
    assert loaded.forward(torch.ones(4, 2)).shape == (4, 3)
    assert not getattr(loaded.forward, "training", False)
    assert loaded.preprocess is None and loaded.class_names is None and loaded.preprocessing == {}


def test_user_attributes(module):
    code = """
class Net(nn.Linear):
    class_names, feature_names, input_size, patch_size = ("a", "b"), ["x", "y"], 8, 4
    def preprocess(self, items):
        return torch.zeros(len(items), 2)

def make():
    return Net(2, 2)
"""
    loaded = load_model(f"{module(code)}:make")
    assert loaded.class_names == ["a", "b"] and loaded.feature_names == ["x", "y"]
    assert loaded.input_size == (8, 8) and loaded.patch_size == 4
    assert loaded.preprocess([None] * 3).shape == (3, 2)


HOLDERS = {
    "function": "lambda x: net(x).softmax(1)",
    "object": "Holder()",
    "method": "Holder().run",
    "partial": "functools.partial(call, net)",
}


@pytest.mark.parametrize("name", HOLDERS)
def test_modules_behind_functions_are_put_in_eval_mode_and_hashed(module, name):
    code = f"""
import functools
call = lambda net, x: net(x)
class Holder:
    def __init__(self):
        self.inner = net
    def __call__(self, x):
        return self.inner(x)
    run = __call__
net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
def make():
    return {HOLDERS[name]}
"""
    source = module(code)
    loaded = load_model(f"{source}:make")
    x = torch.rand(3, 2)
    assert torch.equal(loaded.forward(x), loaded.forward(x))
    with torch.no_grad():
        sys.modules[source.removeprefix("py:")].net[0].bias.add_(1)
    assert load_model(f"{source}:make").fingerprint != loaded.fingerprint


@pytest.mark.parametrize("frame", [False, True])
def test_estimators(module, frame):
    import pandas as pd
    from sklearn.linear_model import LogisticRegression

    code = f"""
import pandas as pd
from sklearn.linear_model import LogisticRegression
def make():
    x = torch.arange(24.0).view(8, 3).sin().numpy()
    x = pd.DataFrame(x, columns=["u", "v", "w"]) if {frame} else x
    return LogisticRegression().fit(x, ["no", "yes"] * 4)
"""
    spec = f"{module(code)}:make"
    x = torch.arange(24.0).view(8, 3).sin()
    rows = pd.DataFrame(x.numpy(), columns=["u", "v", "w"]) if frame else x.numpy()
    wanted = LogisticRegression().fit(rows, ["no", "yes"] * 4)
    loaded = load_model(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = loaded.forward(x)
    assert got.dtype == torch.float64 and np.allclose(got.numpy(), wanted.predict_proba(rows), atol=1e-7)
    assert loaded.class_names == ["no", "yes"] and loaded.feature_names == (["u", "v", "w"] if frame else None)
    assert load_model(spec).fingerprint == loaded.fingerprint
    result = xaifast.kernel_shap(loaded.forward, x[:2], target=1)
    torch.testing.assert_close(result.values.sum(1), result.full_values - result.base_values, check_dtype=False)


def test_user_fingerprint(module, tmp_path):
    code = "def make():\n    torch.manual_seed({})\n    return nn.Linear(2, 2)\n{}"
    first = load_model(f"{module(code.format(0, ''))}:make").fingerprint
    same = load_model(f"{module(code.format(0, ''))}:make").fingerprint
    others = [load_model(f"{module(code.format(*a))}:make").fingerprint for a in ((1, ""), (0, "# other"))]
    assert same == first and len({first, *others}) == 3
    weights = "state = torch.load('w.pt', weights_only=True)\ndef make():\n    net = nn.Linear(2, 2)\n"
    weights += "    net.load_state_dict(state)\n    return net"
    seen = set()
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "w.pt")
        seen.add(load_model(f"{module(weights)}:make").fingerprint)
    assert len(seen) == 2


def test_estimator_fingerprint(module):
    code = """
import numpy as np
from sklearn.tree import DecisionTreeClassifier
def make():
    return DecisionTreeClassifier(random_state=0).fit(np.arange(8.0).reshape(4, 2), np.load("y.npy"))
"""
    seen = set()
    for labels in ([0, 0, 1, 1], [0, 1, 1, 1]):
        np.save("y.npy", labels)
        seen.add(load_model(f"{module(code)}:make").fingerprint)
    assert len(seen) == 2


def test_path_is_restored(module):
    before = list(sys.path)
    load_model(f"{module('make = nn.Linear(1, 1)')}:make")
    assert sys.path == before


BAD_CODE = {
    "no such name": ("def other():\n    pass", ValueError, r"must define 'make'.*\['other'\]"),
    "raises": ("def make():\n    raise KeyError('weights')", ValueError, "raised KeyError: 'weights'"),
    "import raises": ("1 / 0", ValueError, "importing .* failed: ZeroDivisionError"),
    "import of import": ("import not_there_at_all", ValueError, "failed: No module named 'not_there_at_all'"),
    "syntax": ("def", ValueError, "SyntaxError"),
    "returns nothing": ("def make():\n    pass", TypeError, "must return a model.*got NoneType"),
    "returns a class": ("def make():\n    return nn.Linear", TypeError, "Linear"),
    "is a number": ("make = 3", TypeError, "must name a model or a callable, got int"),
    "class with arguments": ("make = nn.Linear", TypeError, "without arguments"),
    "patch size": ("make = nn.Linear(1, 1)\nmake.patch_size = 'x'", TypeError, "patch_size an int.*'x'"),
    "estimator that cannot be hashed": (
        "class Model:\n    predict_proba = None\nmake = Model()\nmake.f = lambda: 0",
        ValueError,
        "must be picklable",
    ),
    "input size": (
        "make = nn.Linear(1, 1)\nmake.input_size = (3, 8, 8)",
        TypeError,
        r"input_size must be .*\(3, 8, 8\)",
    ),
    "class names": ("make = nn.Linear(1, 1)\nmake.class_names = 'ab'", TypeError, "class_names must be a list"),
}


@pytest.mark.parametrize("name", BAD_CODE)
def test_user_code_that_fails(module, name):
    code, error, message = BAD_CODE[name]
    with pytest.raises(error, match=f"(?s)xaifast.load_model.*{message}"):
        load_model(f"{module(code)}:make")


def test_causes_are_chained(module):
    with pytest.raises(ValueError) as caught:
        load_model(f"{module(BAD_CODE['raises'][0])}:make")
    assert isinstance(caught.value.__cause__, KeyError)


# ---- the package's own


MODELS = {
    "ConvNet": lambda: ConvNet(3, 12, 4, widths=(4, 5, 6), hidden=7),
    "MLP": lambda: MLP(5, 2, hidden=(3,)),
    "VisionTransformer": lambda: VisionTransformer(12, 4, 3, dim=8, depth=1, heads=2),
}
INPUTS = {"ConvNet": (2, 3, 12, 12), "MLP": (2, 5), "VisionTransformer": (2, 3, 12, 12)}


@pytest.mark.parametrize("name", MODELS)
def test_saved_models(tmp_path, name):
    model = MODELS[name]().eval()
    n_classes = model.config["n_classes"]
    save_model(model, tmp_path / "new/dir", class_names=[f"c{i}" for i in range(n_classes)])
    loaded = load_model(f"xaifast:{tmp_path / 'new/dir'}")
    x = torch.rand(INPUTS[name])
    assert torch.equal(loaded.forward(x), model(x)) and not loaded.forward.training
    assert loaded.class_names == [f"c{i}" for i in range(n_classes)]
    assert loaded.input_size == (None if name == "MLP" else (12, 12))
    assert loaded.patch_size == (4 if name == "VisionTransformer" else None)
    assert sorted(os.listdir(tmp_path / "new/dir")) == ["config.json", "model.safetensors"]


def test_convnet_is_the_demos():
    wanted = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 16, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 10),
    )  # fmt: skip
    assert str(ConvNet().layers) == str(wanted)
    with pytest.raises(ValueError, match="widths"):
        ConvNet(size=2, widths=(4, 4, 4, 4))


def test_saved_fingerprint(tmp_path):
    model = ConvNet()
    seen = []
    for name in "abc":
        save_model(model, tmp_path / name, class_names=list("0123456789") if name == "b" else None)
        seen.append(load_model(f"xaifast:{tmp_path / name}").fingerprint)
        if name == "b":
            model.layers[0].weight.data[0] += 1e-6
    assert seen[0] == seen[1] != seen[2]


def test_corrupt_saved_models(tmp_path):
    save_model(MLP(2, 2), tmp_path)
    weights, config = (tmp_path / "model.safetensors").read_bytes(), (tmp_path / "config.json").read_text()
    spec = f"xaifast:{tmp_path}"
    flipped = bytearray(weights)
    flipped[-1] ^= 1
    for content in (weights[:-50], bytes(flipped), b""):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="corrupt"):
            load_model(spec)
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert load_model(spec)
    for old, new, message in [
        ('"MLP"', '"os.system"', "got format 1 and model 'os.system'"),
        ('"format": 1', '"format": 2', "got format 2"),
        ('"in_features"', '"features"', "corrupt"),
        ('"in_features": 2', '"in_features": 3', "corrupt"),
        ('"hidden": [', '"hidden": [1000000000000, ', "corrupt.*size mismatch"),
        ('"class_names": null', '"class_names": ["a"]', r"corrupt.*one an output, got \['a'\]"),
        ('"MLP"', '["MLP"]', r"model \['MLP'\]"),
        ("{", "", "corrupt"),
    ]:
        (tmp_path / "config.json").write_text(config.replace(old, new, 1))
        with pytest.raises(ValueError, match=f"(?s){message}"):
            load_model(spec)
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        load_model(spec)


def test_loading_leaves_random_state_alone(tmp_path, vit):
    save_model(ConvNet(), tmp_path)
    before = torch.get_rng_state()
    for spec in (f"xaifast:{tmp_path}", f"hf:{vit}"):
        loaded = load_model(spec).forward
        assert torch.equal(torch.get_rng_state(), before)
        assert all(x.device.type == "cpu" and x.dtype == torch.float32 for x in loaded.parameters())


def test_weights_of_another_saving_are_refused(tmp_path):
    save_model(MLP(2, 2), tmp_path)
    old = (tmp_path / "config.json").read_bytes()
    save_model(MLP(2, 2), tmp_path)
    (tmp_path / "config.json").write_bytes(old)
    with pytest.raises(ValueError, match="not those that were saved"):
        load_model(f"xaifast:{tmp_path}")


def test_interrupted_saving_keeps_the_old_model(tmp_path, monkeypatch):
    save_model(MLP(2, 2), tmp_path)
    before = load_model(f"xaifast:{tmp_path}").fingerprint

    def fail(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        save_model(MLP(2, 2), tmp_path)
    assert load_model(f"xaifast:{tmp_path}").fingerprint == before
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_saving_refuses(tmp_path):
    with pytest.raises(TypeError, match="ConvNet.*got Linear"):
        save_model(nn.Linear(1, 1), tmp_path)
    with pytest.raises(ValueError, match="2 outputs, got 3"):
        save_model(MLP(2, 2), tmp_path, class_names=list("abc"))

    class MLP2(MLP):
        pass

    MLP2.__name__ = "MLP"
    with pytest.raises(TypeError, match="got MLP"):
        save_model(MLP2(2, 2), tmp_path)
    assert not os.listdir(tmp_path)


# ---- all of them


SPECS = {
    "unknown form": ("onnx:x.onnx", ValueError, "hf:DIR_OR_ID.*py:MODULE:CALLABLE.*xaifast:DIR"),
    "bare function": ("nets.vision:make", ValueError, "did you mean py:nets.vision:make"),
    "bare id": ("google/vit", ValueError, "did you mean hf:google/vit"),
    "bare directory": ("/tmp", ValueError, "did you mean hf:/tmp"),
    "nothing": ("hf:", ValueError, "hf:DIR_OR_ID"),
    "no directory": ("hf:./nowhere", FileNotFoundError, "./nowhere"),
    "no home directory": ("hf:~/nowhere-at-all", FileNotFoundError, "~/nowhere-at-all"),
    "no deep directory": ("hf:a/b/c", FileNotFoundError, "a/b/c"),
    "no saved directory": ("xaifast:./nowhere", FileNotFoundError, "nowhere"),
    "not saved": ("xaifast:.", FileNotFoundError, "save_model"),
    "no module": ("py:no_such_module_here:make", ValueError, "no_such_module_here.*without .py"),
    "no callable": ("py:json", ValueError, "py:vision.nets:make"),
    "file": ("py:nets/vision.py:make", ValueError, "as in import"),
    "no text": (3, TypeError, "text"),
}


@pytest.mark.parametrize("name", SPECS)
def test_specs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", None)  # nothing here may ask the Hub
    spec, error, message = SPECS[name]
    with pytest.raises(error, match=f"(?s)xaifast.load_model.*{message}"):
        load_model(spec)


def test_unknown_id_is_asked_for_and_explained(run_python):
    code = "from xaifast.models import load_model\nload_model('hf:no-such-owner/no-such-model')"
    message = run_python(code, fails=True, HF_HUB_OFFLINE="1")
    assert "no-such-owner/no-such-model must be a model of transformers" in message


def test_devices(tmp_path):
    save_model(MLP(2, 2), tmp_path)
    for device in ("tpu9", "cuda:99"):
        with pytest.raises(ValueError, match=f"device must be one that torch can use here, got '{device}'"):
            load_model(f"xaifast:{tmp_path}", device=device)


def test_import_is_cheap(run_python):
    heavy = {"PIL", "pandas", "sklearn", "datasets", "transformers", "joblib"}
    assert run_python(f"import sys, xaifast.models; print({heavy} & set(sys.modules))").strip() == "set()"


def test_missing_transformers_names_the_extra(run_python):
    code = "import sys\nsys.modules['transformers'] = None\nfrom xaifast.models import load_model\nload_model('hf:a/b')"
    assert "pip install 'xaifast[hf]'" in run_python(code, fails=True)
