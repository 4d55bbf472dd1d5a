"""What a run builds: the encoders and heads that its sources need at some step, no others."""

from contextlib import closing
from dataclasses import replace

import pytest

from arbitor.encoder.image import PatchGrid
from arbitor.errors import UserError
from arbitor.main import ARBModel
from arbitor.settings import write_yaml
from ray_jobs import audio, diffusion, pretrain, text, vision
from ray_jobs.config import CONFIG, load_run_config
from ray_jobs.construction import with_needed_parts
from ray_jobs.journal import Journal
from ray_jobs.run_folder import steps_done

JOBS = {"audio": audio, "diffusion": diffusion, "pretrain": pretrain, "text": text}
JOBS["vision"] = vision
SMALL = ("model.width=64", "model.num_layers=1", "model.head_width=32", "model.rotary_width=16")
NO_PICTURES = ("--image-weight", "0", "--video-weight", "0")
WEIGHTS = (*NO_PICTURES, "--audio-weight", "0")
ALWAYS = {"text_encoder", "trunk", "byte_head"}


def load(job, *arguments):
    config = load_run_config(job, [*SMALL, *arguments], JOBS[job].DEFAULTS, "about")
    return with_needed_parts(config)


def parts(config):
    return {name.split(".")[0] for name in ARBModel(config.model, 0).state_dict()} - ALWAYS


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["text"], set()),
        (["audio"], {"audio_encoder", "talker_head"}),
        (["vision"], {"image_encoder"}),
        (["diffusion"], {"image_encoder", "video_encoder", "video_head"}),
        (["pretrain", *WEIGHTS], set()),
        (["pretrain", *WEIGHTS, "--enable-output-router"], set()),
        (
            ["pretrain", *NO_PICTURES, "data.sources.audio.weight=[[0, 0], [9, 0.1]]"],
            {"audio_encoder", "talker_head"},
        ),
        (
            ["audio", "--enable-output-router"],
            {"audio_encoder", "talker_head", "output_router"},
        ),
        (
            ["pretrain"],
            {"image_encoder", "audio_encoder", "video_encoder", "talker_head", "video_head"},
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_run_builds_what_its_sources_need(command, expected):
    config = load(*command)
    assert parts(config) == expected
    assert not config.model.enable_attention
    assert with_needed_parts(config) == config


def test_a_job_leaves_its_parts_out_with_a_file_too_unless_the_file_asks(tmp_path):
    path = tmp_path / "mine.yaml"
    sources = "data: {sources: {a: {modality: image, path: 'sample://image'}}}\n"
    path.write_text(sources + "model: {width: 64, num_layers: 1}\n")
    assert load("vision", str(path)).model.enable_video_head is False
    path.write_text(sources + "model: {enable_video_head: true}\n")
    assert load("vision", str(path)).model.enable_video_head is True


def test_shapes_of_patches_are_those_of_the_data():
    config = load("diffusion", "data.image.size=64", "data.image.patch=8")
    assert config.model.image == PatchGrid(patch=8, side=8, frames=1)
    assert config.model.video == PatchGrid(patch=16, side=4, frames=8)


def test_an_encoder_that_a_source_needs_cannot_be_left_out():
    with pytest.raises(UserError, match="model.enable_audio: is false, but a source of audio has"):
        load("audio", "model.enable_audio=false")


def test_a_resume_does_not_activate_what_was_not_built(tmp_path):
    config = load("pretrain", *WEIGHTS, f"storage={tmp_path}", "--run", "mine")
    config.folder.mkdir()
    (config.folder / CONFIG).write_text(write_yaml(config.values()))
    with closing(Journal(config.folder)) as journal:
        journal.append(1, {"loss/total": 1.0})
    assert steps_done(config) == 0
    more = load("pretrain", f"storage={tmp_path}", "--run", "mine")
    with pytest.raises(UserError) as caught:
        steps_done(more)
    assert "was built without image, whose weight was 0 at every step; set it" in str(caught.value)
    assert "--run another name" in str(caught.value)
    with pytest.raises(UserError, match="seed 0 -> 1"):
        steps_done(replace(config, seed=1))


@pytest.mark.parametrize("weight", [0, 3, -1, 0.3, 2**17])
def test_a_loss_weight_is_a_power_of_two(weight):
    with pytest.raises(UserError, match="loss_weight.image: expected a power of two"):
        load("pretrain", f"loss_weight.image={weight}")
    assert load("pretrain", "loss_weight.image=0.25").loss_weight.of("image") == 0.25


def test_a_width_that_the_video_head_cannot_split_is_refused():
    with pytest.raises(UserError, match="model.width: the video head needs a multiple of head_w"):
        load("diffusion", "model.width=80")
    assert load("vision", "model.width=80").model.width == 80
