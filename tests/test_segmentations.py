"""Masks are found by name, read as their format says, and resized and cropped as images are."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from xaifast.cli.inputs import InputLoader
from xaifast.data import open_data
from xaifast.data.segmentations import BACKGROUND, IGNORED, OBJECT, Segmentations
from xaifast.models import LoadedModel, load_model

B, I, O = BACKGROUND, IGNORED, OBJECT  # noqa: E741


def save(path, values, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = values if isinstance(values, Image.Image) else Image.fromarray(np.asarray(values, np.uint8))
    image.save(path, **options)


@pytest.mark.parametrize(
    ("form", "values", "expected"),
    [
        ("binary", [[0, 1, 255]], [[B, O, O]]),
        ("binary", [[0, 0, 0]], [[B, B, B]]),
        ("pets", [[1, 2, 3]], [[O, B, I]]),
        ("cub", [[0, 127, 128], [51, 204, 255]], [[B, B, O], [B, O, O]]),
    ],
)
def test_formats(tmp_path, form, values, expected):
    save(tmp_path / "a.png", values)
    codes = Segmentations(tmp_path, form).load("a.jpg", np.shape(values))
    assert codes.dtype == np.uint8 and codes.tolist() == expected


def test_other_kinds_of_files(tmp_path):
    save(tmp_path / "bilevel.png", Image.fromarray(np.array([[False, True]])))
    save(tmp_path / "deep.png", Image.fromarray(np.array([[0, 256]], np.uint16)))  # 256 is 0 in its lower byte
    palette = Image.fromarray(np.array([[0, 2]], np.uint8), "L")
    palette.putpalette([9, 9, 9, 0, 0, 0, 0, 0, 0])
    save(tmp_path / "palette.png", palette)
    colours = np.array([[[0, 0, 0, 255], [0, 0, 7, 0]]], np.uint8)  # opaque black, transparent blue
    save(tmp_path / "colours.png", Image.fromarray(colours, "RGBA"))
    grey = np.array([[[0, 255], [200, 255]]], np.uint8)
    save(tmp_path / "alpha.png", Image.fromarray(grey, "LA"))
    for name in ("bilevel", "deep", "palette", "colours", "alpha"):
        assert Segmentations(tmp_path).load(f"{name}.jpg", (1, 2)).tolist() == [[B, O]], name
    assert Segmentations(tmp_path, "cub").load("alpha.jpg", (1, 2)).tolist() == [[B, O]]
    with pytest.raises(ValueError, match="colours.png of colours.jpg cannot be read: values must be grey"):
        Segmentations(tmp_path, "cub").load("colours.jpg", (1, 2))


def test_what_is_no_trimap_is_refused(tmp_path):
    save(tmp_path / "a.png", [[0, 255]])
    with pytest.raises(ValueError, match=r"trimaps hold 1, 2 and 3, got \[0, 255\]"):
        Segmentations(tmp_path, "pets").load("a.jpg", (1, 2))


def test_masks_are_found_by_path_then_by_stem(tmp_path):
    for name in ("cats/1.png", "dogs/1.png", "dogs/2.png", "deep/er/x.y.tif", ".hidden/3.png", "dogs/._2.png"):
        save(tmp_path / name, [[1]])
    found = Segmentations(tmp_path)
    assert found.find("cats/1.jpg") == "cats/1.png" and found.find("dogs/1.jpeg") == "dogs/1.png"
    assert found.find("2.jpg") == "dogs/2.png" and found.find("other/2") == "dogs/2.png"
    assert found.find("x.y.jpg") == "deep/er/x.y.tif"
    reasons = found.missing(["1.jpg", "2.jpg", "3.jpg", "x.jpg"])
    assert list(reasons) == ["1.jpg", "3.jpg", "x.jpg"]
    assert "1.jpg has 2 masks (cats/1.png, dogs/1.png)" in reasons["1.jpg"] and "no mask" in reasons["3.jpg"]
    save(tmp_path / "dogs" / "2.bmp", [[1]])
    with pytest.raises(ValueError, match=r"2 masks \(dogs/2.bmp, dogs/2.png\)"):
        Segmentations(tmp_path).find("dogs/2.jpg")


def test_another_size_is_refused(tmp_path):
    save(tmp_path / "a.png", [[1, 1, 1], [1, 1, 1]])
    with pytest.raises(ValueError, match=r"the image's size, 3 x 2 \(height, width\), got 2 x 3"):
        Segmentations(tmp_path).load("a.jpg", (3, 2))


def test_directories_and_forms(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        Segmentations(tmp_path / "none")
    with pytest.raises(ValueError, match="must hold mask images"):
        Segmentations(tmp_path)
    save(tmp_path / "a.png", [[1]])
    with pytest.raises(ValueError, match="binary, pets, cub"):
        Segmentations(tmp_path, "voc")


def test_identity_is_content(tmp_path):
    for folder in ("one", "two"):
        save(tmp_path / folder / "a.png", [[1, 0]])
    assert Segmentations(tmp_path / "one").fingerprint() == Segmentations(tmp_path / "two").fingerprint()
    save(tmp_path / "two" / "a.png", [[1, 1]])
    assert Segmentations(tmp_path / "one").fingerprint() != Segmentations(tmp_path / "two").fingerprint()


@pytest.fixture
def photos(tmp_path):
    """Three images of different shapes with masks of random blocks."""
    rng = np.random.default_rng(0)
    for i, shape in enumerate([(40, 60), (60, 40), (33, 47)]):
        save(tmp_path / "images" / f"{i}.png", rng.integers(0, 256, (*shape, 3)))
        mask = np.kron(rng.integers(0, 2, (6, 6)), np.ones((11, 11)))[: shape[0], : shape[1]]
        save(tmp_path / "masks" / f"{i}.png", 255 * mask)
    return open_data(f"imagefolder:{tmp_path / 'images'}"), Segmentations(tmp_path / "masks")


def plain(**changes):
    return LoadedModel(**{"forward": None, "spec": "py:m:m", "fingerprint": "", **changes})


def raw(data, segmentations, i):
    codes = segmentations.load(data.names[i], data.load([i]).items[0].size[::-1])
    return Image.fromarray(codes)


def test_default_preprocessing_resizes_to_the_nearest_pixel(photos):
    data, segmentations = photos
    batch = InputLoader(data, plain(), image_size=(16, 24), segmentations=segmentations)(0, 3)
    assert batch.masks.shape == (3, 16, 24)
    for i in range(3):
        expected = np.asarray(raw(data, segmentations, i).resize((24, 16), Image.Resampling.NEAREST))
        assert np.array_equal(batch.masks[i].numpy(), expected == OBJECT)


@pytest.mark.parametrize("crop", [None, 24])
def test_hugging_face_preprocessing_moves_masks_as_images(photos, tmp_path, crop):
    """An image that shows its own mask has the mask's shape after it, but for mixed borders."""
    data, segmentations = photos
    config = ViTConfig(image_size=crop or 32, patch_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    if crop:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": crop, "width": crop})
    else:
        processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "vit")
    model = load_model(f"hf:{tmp_path / 'vit'}")
    masks = InputLoader(data, model, segmentations=segmentations)(0, 3).masks
    assert masks.shape == (3, crop or 32, crop or 32)
    for i in range(3):
        shown = model.preprocess([raw(data, segmentations, i).convert("RGB")])[0, 0]  # normalised, bilinear
        shown = (shown - shown.min()) / (shown.max() - shown.min())
        sure = (shown < 0.02) | (shown > 0.98)
        assert sure.float().mean() > 0.5
        assert torch.equal(masks[i][sure].bool(), shown[sure] > 0.5)


def test_arrays_have_masks_of_their_size(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.zeros((2, 1, 3, 4), np.float32))
    save(tmp_path / "masks" / "0.png", [[1, 2, 3, 1]] * 3)
    save(tmp_path / "masks" / "1.png", [[1, 2, 3]] * 3)
    loader = InputLoader(
        open_data(f"npz:{tmp_path / 'x.npz'}"), plain(), segmentations=Segmentations(tmp_path / "masks", "pets")
    )
    row = [1.0, 0.0, np.nan, 1.0]
    assert np.array_equal(loader(0, 1).masks.numpy(), [[row] * 3], equal_nan=True)
    with pytest.raises(ValueError, match="1.png of 1 must have the image's size, 3 x 4"):
        loader(0, 2)


def test_masks_that_cannot_be_read_stop_or_are_nan(photos, tmp_path):
    data, segmentations = photos
    (tmp_path / "masks" / "1.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="mask 1.png of 1.png cannot be read.*--on-error skip"):
        InputLoader(data, plain(), image_size=(8, 8), segmentations=segmentations)(0, 3)
    masks = InputLoader(data, plain(), image_size=(8, 8), segmentations=segmentations, skip_masks=True)(0, 3).masks
    assert masks.isnan().flatten(1).all(1).tolist() == [False, True, False] and not masks[[0, 2]].isnan().any()


def test_own_preprocessing_must_say_what_it_does_to_masks(photos):
    data, segmentations = photos

    def prepare(images):
        return torch.zeros(len(images), 3, 5, 7)

    with pytest.raises(ValueError, match="py:m:m does not say how.*preprocess_masks"):
        InputLoader(data, plain(preprocess=prepare), segmentations=segmentations)

    def masks(codes):
        return torch.stack([torch.from_numpy(mask[:5, :7].copy()) for mask in codes])

    loader = InputLoader(data, plain(preprocess=prepare, preprocess_masks=masks), segmentations=segmentations)
    expected = np.asarray(raw(data, segmentations, 2))[:5, :7] == OBJECT
    assert np.array_equal(loader(2, 3).masks[0].numpy(), expected)


def test_layouts_of_pets_and_cub(tmp_path):
    """As the archives unpack: flat images with trimaps beside, and folders by class on both sides."""
    image = np.zeros((4, 4, 3))
    for name in ("Abyssinian_1", "Abyssinian_2", "beagle_1"):
        save(tmp_path / "pets" / "images" / f"{name}.jpg", image)
        save(tmp_path / "pets" / "annotations" / "trimaps" / f"{name}.png", [[1, 2, 3, 3]] * 4)
        (tmp_path / "pets" / "annotations" / "trimaps" / f"._{name}.png").write_bytes(b"Mac OS X")
    (tmp_path / "pets" / "images" / "Abyssinian_100.mat").write_bytes(b"MATLAB")
    pets = open_data(f"imagefolder:{tmp_path / 'pets' / 'images'}")
    assert len(pets) == 3 and pets.labels is None
    trimaps = Segmentations(tmp_path / "pets" / "annotations" / "trimaps", "pets")
    assert not trimaps.missing(pets.names)
    assert trimaps.load(pets.names[2], (4, 4)).tolist() == [[O, B, I, I]] * 4

    for name in ("001.Albatross/Albatross_1", "002.Auk/Auk_7"):
        save(tmp_path / "CUB_200_2011" / "images" / f"{name}.jpg", image)
        save(tmp_path / "segmentations" / f"{name}.png", [[0, 102, 153, 255]] * 4)
    birds = open_data(f"imagefolder:{tmp_path / 'CUB_200_2011' / 'images'}")
    assert birds.class_names == ["001.Albatross", "002.Auk"]
    segmentations = Segmentations(tmp_path / "segmentations", "cub")
    assert segmentations.load(birds.names[1], (4, 4)).tolist() == [[B, B, O, O]] * 4
