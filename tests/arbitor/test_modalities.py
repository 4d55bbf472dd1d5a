"""Every modality over the full stack: no position sees a later one or another row."""

from dataclasses import replace

import pytest
import torch

from arbitor.batch import NO_TARGET
from arbitor.encoder.places import Places
from arbitor.kernel.backend import clear_path_counts, path_counts
from arbitor.loss import FIGURES
from arbitor.main import ARBModel
from arbitor.vocab import CONTENT_SYMBOLS, NUM_BYTES, PADDING
from tests.arbitor.content_slots import ALL_PARTS, SHAPES, made_up_slot

ROW = 1  # the one that is changed


@pytest.fixture(scope="module")
def model():
    return ARBModel(ALL_PARTS, seed=1)


def hidden_of(model, batch):
    return model.hidden(model.embed(batch, Places.of(batch)))


def changed_at(batch, position):
    """The slot with another byte, or other content, at a position of ROW; None for a special."""
    places = Places.of(batch)
    if places.is_place_BT[ROW, position]:
        content = batch.content_BPX.clone()
        content[ROW, places.before_BT[ROW, position]] ^= 255
        return replace(batch, content_BPX=content)
    if batch.symbols_BT[ROW, position] >= NUM_BYTES:
        return None
    symbols = batch.symbols_BT.clone()
    symbols[ROW, position] ^= 1
    return replace(batch, symbols_BT=symbols)


@pytest.mark.parametrize("caption_first", [True, False], ids=["caption first", "content first"])
@pytest.mark.parametrize("modality", CONTENT_SYMBOLS)
@torch.no_grad()
def test_a_position_changes_nothing_before_it_nor_in_other_rows(model, modality, caption_first):
    batch = made_up_slot(modality, caption_first=caption_first)
    before = hidden_of(model, batch)
    heads = (model.byte_head, model.talker_head, model.output_router)
    tried = 0
    for position in range(batch.symbols_BT.shape[1]):
        other = changed_at(batch, position)
        if other is None:
            continue
        after = hidden_of(model, other)
        for a, b in [(before, after), *((head(before), head(after)) for head in heads)]:
            assert torch.equal(a[[0, 2]], b[[0, 2]])
            assert torch.equal(a[ROW, :position], b[ROW, :position])
        assert not torch.equal(before[ROW, position], after[ROW, position])
        # From the window of the text encoder on: attention carries it to the end.
        assert not torch.equal(before[ROW, -1], after[ROW, -1])
        tried += 1
    assert tried == SHAPES[modality][0] + 5


@pytest.mark.parametrize("caption_first", [True, False], ids=["caption first", "content first"])
@pytest.mark.parametrize("modality", ["image", "video"])
@torch.no_grad()
def test_a_frame_is_denoised_from_its_own_noise_and_the_states_before_it(
    model, modality, caption_first
):
    batch = made_up_slot(modality, caption_first=caption_first)
    places, hidden = Places.of(batch), hidden_of(model, batch)
    grid = model.video_head.grids[modality]
    noisy = torch.randn(3, grid.frames, grid.patches_per_frame, grid.patch_values)
    time, frames = torch.full((3, grid.frames), 20), torch.arange(grid.frames)
    first = places.first_position()
    assert first.tolist() == [1 + 1 + (5 if caption_first else 0)] * 3

    def velocity(noisy, hidden):
        return model.video_head(modality, noisy, time, frames, hidden, first)

    expected = velocity(noisy, hidden)
    for position in range(hidden.shape[1]):
        other = hidden.clone()
        other[ROW, position] = -other[ROW, position]
        got = velocity(noisy, other)
        assert torch.equal(got[[0, 2]], expected[[0, 2]])
        for f in range(grid.frames):
            is_before = position < int(first[ROW]) + f * grid.patches_per_frame
            assert torch.equal(got[ROW, f], expected[ROW, f]) != is_before
    for f in range(grid.frames):
        other = noisy.clone()
        other[ROW, f, 2] += 1
        differs = (velocity(other, hidden) != expected).any(-1)
        assert differs[ROW, f].all(), "the patches of a frame see one another"
        differs[ROW, f] = False
        assert not differs.any()


@pytest.mark.parametrize("modality", ["image", "video"])
@torch.no_grad()
def test_the_error_of_a_frame_does_not_depend_on_later_ones(model, modality):
    batch = made_up_slot(modality)
    places = Places.of(batch)
    before = model.video_head.patch_errors(hidden_of(model, batch), batch, places)
    per_frame = before.shape[2]
    for k in range(SHAPES[modality][0]):
        content = batch.content_BPX.clone()
        content[ROW, k] ^= 255
        other = replace(batch, content_BPX=content)
        after = model.video_head.patch_errors(hidden_of(model, other), other, Places.of(other))
        assert torch.equal(before[[0, 2]], after[[0, 2]])
        assert torch.equal(before[ROW, : k // per_frame], after[ROW, : k // per_frame])
        assert not torch.equal(before[ROW, k // per_frame], after[ROW, k // per_frame])


def test_noise_is_that_of_step_and_slot(model):
    batch = made_up_slot("image")

    @torch.no_grad()
    def errors(step, slot):
        other = replace(batch, step_and_slot_2=torch.tensor([step, slot], dtype=torch.int32))
        return model.video_head.patch_errors(hidden_of(model, other), other, Places.of(other))

    assert torch.equal(errors(3, 1), errors(3, 1))
    assert not torch.equal(errors(3, 1), errors(3, 2))
    assert not torch.equal(errors(3, 1), errors(4, 1))


def test_the_router_is_never_called_for_text_and_judged_at_borders(model):
    clear_path_counts()
    for modality in ("text", "code"):
        model(made_up_slot(modality))
    assert ("output_router", "slot") not in path_counts()
    figures = {}
    for modality in CONTENT_SYMBOLS:
        values = model.losses(made_up_slot(modality)).figures_tensor().tolist()
        figures[modality] = dict(zip(FIGURES, values, strict=True))
    assert path_counts()["output_router", "slot"] == 3
    # image: BEGIN -> video, last patch -> byte; the END has no target after a caption first.
    assert figures["image"]["router_majority"] == 1 / 2
    # video: BEGIN and two frames -> video, the last frame -> byte.
    assert figures["video"]["router_majority"] == 3 / 4
    # audio: BEGIN and eight frames -> talker, the last frame -> byte.
    assert figures["audio"]["router_majority"] == pytest.approx(9 / 10)


def test_patches_and_frames_are_no_targets_of_bytes(model):
    """Other logits there change no loss: what is left are the caption and the specials."""
    for modality in CONTENT_SYMBOLS:
        batch = made_up_slot(modality)
        bytes_alone = model.losses(batch).figures["bytes"]
        is_place = Places.of(replace(batch, symbols_BT=batch.targets_BT)).is_place_BT
        masked = batch.targets_BT.masked_fill(is_place, NO_TARGET)
        logits = model.byte_head(hidden_of(model, batch)).float()
        expected = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), masked.flatten(), ignore_index=NO_TARGET
        )
        assert torch.equal(bytes_alone, expected)


def test_an_empty_sequence_changes_no_loss_of_content(model):
    """The last slot of a window may have fewer rows than others: the rest is padding."""
    for modality in CONTENT_SYMBOLS:
        batch = made_up_slot(modality)
        symbols, targets = batch.symbols_BT.clone(), batch.targets_BT.clone()
        symbols[2], targets[2] = PADDING, NO_TARGET
        content = batch.content_BPX.clone()
        padded = replace(batch, symbols_BT=symbols, targets_BT=targets, content_BPX=content)
        expected = model.losses(padded).figures["content"]
        content[2] ^= 255
        other = replace(padded, content_BPX=content)
        assert torch.equal(model.losses(other).figures["content"], expected)
        assert expected.isfinite()


def test_only_what_a_slot_uses_gets_a_gradient():
    model = ARBModel(ALL_PARTS, seed=1)
    expected = {
        "text": {"text_encoder", "trunk", "byte_head"},
        "image": {"text_encoder", "image_encoder", "trunk", "byte_head"}
        | {"video_head", "output_router"},
        "audio": {"text_encoder", "audio_encoder", "trunk", "byte_head"}
        | {"talker_head", "output_router"},
    }
    for modality, parts in expected.items():
        losses = model.losses(made_up_slot(modality))
        losses.loss.backward()
        assert losses.figures["trunk_gradient_rms"] > 0
        touched = set()
        for name, weight in model.ternary_weights():
            if weight.slot_gradient is not None:
                touched.add(name.split(".")[0])
            weight.slot_gradient = None
        assert touched == parts
