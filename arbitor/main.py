"""ARBModel: encoder -> VQ bridge -> trunk -> MoEGraph loop -> head; reads like the figure.

`python -m arbitor.main CONFIG` prints a configuration's model, part by part; a size such as 150m
prints the full text stack of that size.
Shape letters: B sequences, T positions, D width, V symbols, C code width, X values of a place.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from arbitor.attention.kv_cache import KvLedger
from arbitor.batch import SlotBatch
from arbitor.encoder.audio import AudioEncoder
from arbitor.encoder.frozen_image import FrozenImageEncoder, read_transformer, shapes_of
from arbitor.encoder.image import ImageEncoder, to_values
from arbitor.encoder.places import Places
from arbitor.encoder.text import WINDOW, TextEncoder
from arbitor.encoder.video import VideoEncoder
from arbitor.errors import UserError, end_with
from arbitor.graph import MoEGraph
from arbitor.head.byte import ByteHead
from arbitor.head.router import OutputRouter
from arbitor.head.talker import TalkerHead
from arbitor.head.video import VideoHead
from arbitor.kernel.state_format import StateFormat
from arbitor.kernel.ternary_scale import TernaryWeight
from arbitor.loop import Loop
from arbitor.loss import ROUTER_WEIGHT, SlotLosses, symbol_loss, watch_gradient
from arbitor.model_config import SIZES, ModelConfig, read_model_config
from arbitor.model_table import model_table
from arbitor.settings import build_part, read_yaml, section
from arbitor.step_counts import StepCounts
from arbitor.trunk import Block, LoopBlock
from arbitor.vq import CODE_WIDTH, VQBridge

__all__ = ["SIZES", "ARBModel", "ModelConfig"]


class ARBModel(nn.Module):
    """Calling it on a slot gives the slot's loss; gradients stay with the ternary weights."""

    def __init__(
        self,
        config: ModelConfig,
        seed: int,
        format: StateFormat | None = None,
        saved: Mapping[str, Tensor] | None = None,
    ):
        """Of `saved` tensors, which are to be loaded, only shapes that no configuration says."""
        super().__init__()
        format = format or StateFormat()
        format.check_activation(config.activation)
        self.config = config
        self.text_encoder = TextEncoder(config.width, config.activation)
        self.image_encoder = self.audio_encoder = self.video_encoder = None
        if config.enable_image:
            self.image_encoder = _image_encoder(config, saved or {})
        if config.enable_audio:
            self.audio_encoder = AudioEncoder(config.width)
        if config.enable_video:
            self.video_encoder = VideoEncoder(config.video, config.width, config.activation)
        self.vq_bridge = _vq_bridge(config) if config.enable_vq else None
        self.trunk = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.graph = MoEGraph(config.codebook_size, CODE_WIDTH) if config.enable_graph else None
        self.loop = _loop(config) if config.has_loop else None
        self.byte_head = ByteHead(config.width, config.activation)
        self.talker_head = self.video_head = self.output_router = None
        if config.enable_talker_head:
            self.talker_head = TalkerHead(config.width, config.activation)
        if config.enable_video_head:
            self.video_head = _video_head(config, seed)
        if config.enable_output_router:
            self.output_router = OutputRouter(config.width, config.activation)
        for name, weight in self.ternary_weights():
            weight.initialize(seed, name, format)

    def forward(self, batch: SlotBatch) -> Tensor:
        """Loss of one slot, float32 scalar: nats per byte, nats per code, velocity error summed."""
        return self.losses(batch).loss

    def losses(self, batch: SlotBatch) -> SlotLosses:
        """The loss of a slot and the parts that it is the sum of."""
        places = None if batch.content_BPX is None else Places.of(batch)
        hidden_BTD, auxiliary = self._run(self.embed(batch, places))
        hidden_BTD, gradient_rms = watch_gradient(hidden_BTD)
        figures = {"trunk_gradient_rms": gradient_rms}
        loss = symbol_loss(self.byte_head(hidden_BTD), batch.targets_BT)
        figures["bytes"] = loss.detach()
        content = None
        if batch.modality == "audio" and self.talker_head is not None:
            content = self.talker_head.loss(hidden_BTD, batch.targets_BT, places)
        if batch.modality in ("image", "video") and self.video_head is not None:
            content = self.video_head.loss(hidden_BTD, batch, places)
        if content is not None:
            loss, figures["content"] = loss + content, content.detach()
        if places is not None and self.output_router is not None:
            router = self.output_router.loss(
                hidden_BTD,
                batch.symbols_BT,
                batch.targets_BT,
                places,
                self.config.patches_spoken_at_once(batch.modality),
            )
            loss = loss + ROUTER_WEIGHT * router.loss
            figures["router"] = router.loss.detach()
            figures["router_accuracy"] = router.accuracy
            figures["router_majority"] = router.majority
        for part_loss in auxiliary:  # gives its gradient and leaves the value alone
            loss = loss + (part_loss - part_loss.detach())
        return SlotLosses(loss, figures)

    def embed(self, batch: SlotBatch, places: Places | None) -> Tensor:
        """bfloat16 [B, T, D]: the content at its places, by the encoder of its modality, and the
        symbols elsewhere."""
        text_BTD = self.text_encoder(batch.symbols_BT)
        encoder = self.content_encoder(batch.modality)
        if encoder is None:
            return text_BTD
        if isinstance(encoder, FrozenImageEncoder):
            features_BPE = encoder.features(places.content_BPX)
            features_BTE = replace(places, content_BPX=features_BPE).content()
            return places.fill(text_BTD, encoder.project(features_BTE))
        content_BTX, number_BT = places.content(), places.number_BT
        return places.fill(text_BTD, self.encode(batch.modality, content_BTX, number_BT))

    def content_encoder(self, modality: str) -> nn.Module | None:
        """None for text and code, and for a modality that the model was built without."""
        return {
            "image": self.image_encoder,
            "audio": self.audio_encoder,
            "video": self.video_encoder,
        }.get(modality)

    def encode(self, modality: str, content: Tensor, number: Tensor) -> Tensor:
        """bfloat16 [..., D] of content, uint8 [..., X], at places with the numbers [...].

        A frozen encoder takes whole pictures.
        """
        encoder = self.content_encoder(modality)
        if modality == "audio" or isinstance(encoder, FrozenImageEncoder):
            return encoder(content)
        return encoder(to_values(content), number)

    def hidden(self, embedded_BTD: Tensor, ledger: KvLedger | None = None) -> Tensor:
        """What the heads read, bfloat16 [B, T, D]; a ledger is moved on."""
        return self._run(embedded_BTD, ledger)[0]

    def _run(
        self, hidden_BTD: Tensor, ledger: KvLedger | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The same, and the auxiliary losses of the parts."""
        step, caches = None, [None] * len(self.trunk)
        if ledger is not None:
            step, caches = ledger.step(hidden_BTD.shape[1]), ledger.layers
        auxiliary, message_BTC = [], None
        if self.vq_bridge is not None:
            hidden_BTD, codes_BT, vq_loss = self.vq_bridge(hidden_BTD)
            auxiliary.append(vq_loss)
        for block, cache in zip(self.trunk, caches, strict=True):
            hidden_BTD = block(hidden_BTD, cache, step)
        if self.graph is not None:
            message_BTC = self.graph(codes_BT)
        if self.loop is not None:
            hidden_BTD, ponder_cost = self.loop(hidden_BTD, message_BTC)
            auxiliary += [] if ponder_cost is None else [ponder_cost]
        if ledger is not None:
            ledger.position += hidden_BTD.shape[1]
        return hidden_BTD, auxiliary

    def logits(self, symbols_BT: Tensor) -> Tensor:
        """int64 [B, T] of text or code -> bfloat16 [B, T, V]: what comes after each symbol."""
        return self.byte_head(self.hidden(self.text_encoder(symbols_BT)))

    def hidden_after(
        self, symbols_BT: Tensor, ledger: KvLedger, content_BTD: Tensor | None = None
    ) -> Tensor:
        """bfloat16 [B, T, D]: what the heads read of symbols that go on where the ledger ends; it
        has reserved room and is moved on. Places have what was encoded of their content."""
        text_BTD = self.text_encoder(symbols_BT, ledger.embedded)
        return self.hidden(text_BTD if content_BTD is None else content_BTD, ledger)

    def step_counts(self) -> list[tuple[str, StepCounts]]:
        """The modules whose integer state moves once a step, with their qualified names."""
        return [(n, m) for n, m in self.named_modules() if isinstance(m, StepCounts)]

    def ledger(self, batch_size: int, dtype: torch.dtype = torch.bfloat16) -> KvLedger:
        """A ledger before the first symbol; dtype is that of the stream."""
        config, device = self.config, next(self.buffers()).device
        caches = [
            block.attention and block.attention.blank_cache(batch_size, dtype, device)
            for block in self.trunk
        ]
        return KvLedger(
            config.attention_window,
            config.hca_stride,
            config.rotary_width // 2,
            torch.zeros(1, dtype=torch.int64, device=device),
            torch.zeros(batch_size, WINDOW - 1, config.width, dtype=dtype, device=device),
            caches,
        )

    def pack(self) -> None:
        """Keeps of every weight what generation needs: two bits a weight and its scales."""
        for _, weight in self.ternary_weights():
            weight.pack()

    def ternary_weights(self) -> list[tuple[str, TernaryWeight]]:
        """Every weight of the model with its qualified name, in order of construction."""
        return [(n, m) for n, m in self.named_modules() if isinstance(m, TernaryWeight)]


def _image_encoder(
    config: ModelConfig, saved: Mapping[str, Tensor]
) -> ImageEncoder | FrozenImageEncoder:
    if not config.image_encoder:
        return ImageEncoder(config.image, config.width, config.activation)
    weights = shapes_of(saved, "image_encoder")
    weights = weights or read_transformer(Path(config.image_encoder), config.image)
    return FrozenImageEncoder(weights, config.width, config.activation)


def _vq_bridge(config: ModelConfig) -> VQBridge:
    return VQBridge(config.width, config.codebook_size, config.activation, config.output_gain)


def _loop(config: ModelConfig) -> Loop:
    return Loop(LoopBlock(config), config.width, config.activation, config.enable_act)


def _video_head(config: ModelConfig, seed: int) -> VideoHead:
    return VideoHead(
        config.denoised_grids,
        config.width,
        config.video_head_layers,
        config.head_width,
        config.feed_forward_width,
        config.activation,
        seed,
    )


def full_text_stack(size: str) -> dict[str, int | bool]:
    """The section `model` of a size of `SIZES` with everything that a text model has."""
    width, num_layers = SIZES[size]
    parts = {f"enable_{part}": True for part in ("attention", "vq", "graph", "moe")}
    return {"width": width, "num_layers": num_layers} | parts


def main(arguments: list[str]) -> str:
    """The table of a configuration's or a size's model; nothing is computed."""
    if len(arguments) != 1:
        raise UserError(
            "expected one CONFIG file or size: python -m arbitor.main CONFIG,"
            f" or one of {', '.join(SIZES)}"
        )
    (named,) = arguments
    values = {"model": full_text_stack(named)} if named in SIZES else read_yaml(named)
    config = read_model_config(values)
    format = build_part(StateFormat, section(values, "update"), "update")
    with torch.device("meta"):  # shapes alone
        return model_table(ARBModel(config, 0, format), config)


if __name__ == "__main__":
    end_with(lambda words: print(main(words)))
