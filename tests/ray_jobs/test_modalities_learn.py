"""Each modality learns on its sample shards: a tiny model gets below what counting alone gives, and
content is more likely beside its own caption than beside another's."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from arbitor.audio_codec import NUM_CODES, NUM_LEVELS
from arbitor.head.video import NUM_TIMES
from arbitor.main import ARBModel, ModelConfig
from arbitor.optimizer import TernaryOptimizer, UpdateConfig
from arbitor.settings import build
from arbitor.trainer import evaluate, train
from data_pipeline.index import index_sources
from data_pipeline.run_data import RunData, held_out_slots, read_slots
from data_pipeline.schema import DataConfig
from data_pipeline.statistics import bigram_entropy
from ray_jobs.config import RunConfig
from ray_jobs.construction import with_needed_parts
from ray_jobs.slots import by_step, to_batch

CPU = torch.device("cpu")
STEPS = {"text": 250, "code": 250, "image": 150, "audio": 250, "video": 150}
DATA = {
    "batch_size": 8,
    "sequence_length": 64,
    "slots_per_step": 2,
    "eval_slots": 12,
    "image": {"size": 32, "patch": 8, "sequence_length": 64},
    "audio": {"seconds_max": 0.6, "sequence_length": 64},
    "video": {"size": 16, "patch": 8, "num_frames": 4, "frames_per_second": 2.0}
    | {"sequence_length": 64},
}
MODEL = ModelConfig(
    width=96,
    num_layers=1,
    head_width=32,
    rotary_width=16,
    enable_attention=True,
    enable_output_router=True,
)
UPDATE = UpdateConfig(warmup_steps=20, table_rate=1.0)


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return tmp_path_factory.mktemp("learn")


def learn(modality, storage):
    """(the data, the trained model, its held-out slots)."""
    sources = {modality: {"modality": modality, "path": f"sample://{modality}"}}
    data = build(DataConfig, DATA | {"sources": sources}, "data")
    config = with_needed_parts(RunConfig(name="learn", model=MODEL, update=UPDATE, data=data))
    run_data = RunData(data, index_sources(data, storage=storage), seed=0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = ARBModel(config.model, 0)
    steps = STEPS[modality]
    optimizer = TernaryOptimizer(model, UPDATE, total_steps=steps, slots_per_step=2, seed=0)
    slots = by_step(read_slots(run_data, 0, steps, 0, 1), CPU)
    train(model, optimizer, slots, lambda report: None, loss_weight=config.loss_weight)
    torch.set_num_threads(threads)
    return run_data, model, [to_batch(slot, CPU) for slot in held_out_slots(run_data, modality)]


def beside_other_captions(batch):
    """The slot with each row's symbols moved to the next row; content, noise and times stay."""
    return replace(
        batch, symbols_BT=batch.symbols_BT.roll(1, 0), targets_BT=batch.targets_BT.roll(1, 0)
    )


def assert_captions_matter(model, held):
    whole = [b for b in held if b.targets_BT.amax(1).min() >= 0 and len(b.symbols_BT) > 1]
    right, other = evaluate(model, whole), evaluate(model, map(beside_other_captions, whole))
    assert right["content"] < other["content"]
    assert right["bytes"] < other["bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("modality", ["text", "code"])
def test_bytes_get_below_the_bigram_of_their_data(modality, storage):
    run_data, model, held = learn(modality, storage)
    assert evaluate(model, held)["loss"] < bigram_entropy(run_data, modality)


@pytest.mark.slow
@pytest.mark.parametrize("modality", ["image", "video"])
def test_patches_get_below_the_best_scalar_and_mean(modality, storage):
    run_data, model, held = learn(modality, storage)
    content = [slot.content for slot in read_slots(run_data, 0, 50, 0, 1)]
    values = np.concatenate(content) / 127.5 - 1
    figures = evaluate(model, held)
    assert figures["content"] < best_scalar_and_mean(values)
    assert figures["router_accuracy"] > figures["router_majority"] + 0.1
    assert_captions_matter(model, held)


@pytest.mark.slow
def test_sound_gets_below_the_bigram_and_repetition(storage):
    run_data, model, held = learn("audio", storage)
    train_clips = clips([to_batch(slot, CPU) for slot in read_slots(run_data, 0, 60, 0, 1)])
    figures = evaluate(model, held)
    assert figures["content"] < best_bigram(train_clips, clips(held))
    assert figures["content"] < best_repetition(clips(held))
    assert figures["router_accuracy"] > figures["router_majority"]
    assert_captions_matter(model, held)


def best_scalar_and_mean(values_RPX):
    """The error of the best v = a(s) x + b(s, place) of x = (1 - s) noise + s values, over times.

    With the variance u of the values around their place's mean it is u / (s^2 u + (1 - s)^2).
    """
    variance = values_RPX.var(axis=0).mean()
    s = np.arange(NUM_TIMES) / NUM_TIMES
    return (variance / (s**2 * variance + (1 - s) ** 2)).mean()


def clips(batches):
    """uint8 [F, C] of every row of the slots; clips fill all places here."""
    return [row.numpy() for b in batches for row in b.content_BPX if row.any()]


def best_bigram(train_clips, held_clips):
    """Nats per code from counts of (code before, code), towards those of codes alone; the best of
    several weights for these."""
    pairs = np.zeros((NUM_CODES, NUM_LEVELS, NUM_LEVELS))
    alone = np.ones((NUM_CODES, NUM_LEVELS))
    every = np.arange(NUM_CODES)
    for clip in train_clips:
        np.add.at(pairs, (every, clip[:-1], clip[1:]), 1)
        np.add.at(alone, (every, clip), 1)
    alone /= alone.sum(axis=1, keepdims=True)

    def nats(weight):
        losses = []
        for clip in held_clips:
            before, now = clip[:-1], clip[1:]
            of_code = alone[every, now]
            seen = pairs[every, before].sum(-1)
            share = (pairs[every, before, now] + weight * of_code) / (seen + weight)
            losses += [-np.log(alone[every, clip[:1]]), -np.log(share)]
        return np.concatenate(losses).mean()

    return min(nats(weight) for weight in (1, 3, 10, 30, 100))


def best_repetition(held_clips):
    """Nats per code if the code before is given the share that it has, all others the same."""
    same = np.concatenate([clip[1:] == clip[:-1] for clip in held_clips]).mean()
    return -(same * np.log(same) + (1 - same) * np.log((1 - same) / (NUM_LEVELS - 1)))
