"""VideoHead: flow matching over the patches of a frame, which are denoised together.

At time s from 0 to 1 a patch is x = (1 - s) noise + s values; the head predicts the velocity
values - noise, and sampling follows it from noise at 0 (Lipman et al. 2023, Liu et al. 2023).
The network's output F enters as v = a(s) x + b(s) F, the best linear guess and its error for values
of the second moment SECOND_MOMENT (the preconditioning of Karras et al. 2022, for a flow), so that
F has the same scale at all times. It is a vector of the patch, and x times a number of the patch:
where the width is below X, x itself could not pass. An image is a video of one frame.
Shape letters: B sequences, T positions, D width, F frames, P patches of a frame, X values of a
patch, S = B F frames in all, N heads, H head width, Q queries, K keys, C = 3 D, G = 2 x the
feed-forward width.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from arbitor.batch import SlotBatch
from arbitor.encoder.image import ImageEncoder, PatchGrid, to_values
from arbitor.encoder.places import Places
from arbitor.encoder.video import VideoEncoder
from arbitor.head.noise import gaussian, noise_key, uniform_words
from arbitor.kernel.ternary_scale import TernaryEmbedding, TernaryLinear

NUM_TIMES = 64  # times are multiples of 1/64
TIME_STRIDE = 37  # odd: the frames of a slot come at times spread evenly
SECOND_MOMENT = 0.25
OUTPUT_GAIN = 0.5


class Context(NamedTuple):
    """What frames are denoised after: states of the trunk, and the first frame's first position."""

    hidden_BTD: Tensor
    first_B: Tensor


class VideoHead(nn.Module):
    """Denoises frames of the modalities in `grids`, given the trunk's states before each."""

    def __init__(
        self,
        grids: Mapping[str, PatchGrid],
        width: int,
        num_layers: int,
        head_width: int,
        feed_forward_width: int,
        activation: str,
        seed: int,
    ):
        super().__init__()
        self.grids, self.seed = dict(grids), seed
        encoders = {"image": ImageEncoder, "video": VideoEncoder}
        self.noisy_patch = nn.ModuleDict(
            {name: encoders[name](grid, width, activation) for name, grid in grids.items()}
        )
        self.time = TernaryEmbedding(NUM_TIMES, width)
        self.blocks = nn.ModuleList(
            DenoiserBlock(width, num_layers, head_width, feed_forward_width, activation)
            for _ in range(num_layers)
        )
        self.share_of_input = TernaryLinear(width, 1, activation, gain=OUTPUT_GAIN)
        self.velocity_of_patch = nn.ModuleDict(
            {
                name: TernaryLinear(width, grid.patch_values, activation, gain=OUTPUT_GAIN)
                for name, grid in grids.items()
            }
        )

    def loss(self, hidden_BTD: Tensor, batch: SlotBatch, places: Places) -> Tensor:
        """Mean squared error of the velocity over a slot's patches, float32 scalar."""
        error_BFP = self.patch_errors(hidden_BTD, batch, places)
        has_frames_B11 = places.is_place_BT.any(1).view(-1, 1, 1)
        count = has_frames_B11.sum() * error_BFP[0].numel()
        return torch.where(has_frames_B11, error_BFP, 0.0).sum() / count

    def patch_errors(self, hidden_BTD: Tensor, batch: SlotBatch, places: Places) -> Tensor:
        """float32 [B, F, P]: each patch's mean squared error, at times and with noise of the slot's
        own; without meaning in sequences without frames."""
        grid = self.grids[batch.modality]
        values_BFPX = to_values(places.content_BPX).unflatten(
            1, (grid.frames, grid.patches_per_frame)
        )
        key = noise_key(batch.step_and_slot_2, self.seed)
        noise_BFPX = gaussian(values_BFPX.numel(), key).view_as(values_BFPX)
        time_BF = slot_times(values_BFPX.shape[0] * grid.frames, key).view(-1, grid.frames)
        share_BF11 = (time_BF / NUM_TIMES)[..., None, None]
        noisy_BFPX = (1 - share_BF11) * noise_BFPX + share_BF11 * values_BFPX
        frame_F = torch.arange(grid.frames, device=noisy_BFPX.device)
        first_B = places.first_position()
        velocity_BFPX = self(batch.modality, noisy_BFPX, time_BF, frame_F, hidden_BTD, first_B)
        return (velocity_BFPX - (values_BFPX - noise_BFPX)).square().mean(-1)

    def forward(
        self,
        modality: str,
        noisy_BFPX: Tensor,
        time_BF: Tensor,
        frame_F: Tensor,
        hidden_BTD: Tensor,
        first_B: Tensor,
    ) -> Tensor:
        """Velocities, float32 [B, F, P, X], of the frames `frame_F` of each sequence.

        A frame sees its own noisy patches and the states before its first position, that is
        first_B + frame * P. Times are int64, in 1/NUM_TIMES.
        """
        grid = self.grids[modality]
        P = grid.patches_per_frame
        number_FP = frame_F.unsqueeze(1) * P + torch.arange(P, device=frame_F.device)
        tokens_BFPD = self.noisy_patch[modality](noisy_BFPX, number_FP)
        tokens_BFPD = tokens_BFPD + self.time(time_BF).unsqueeze(2)
        position_T = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device)
        first_BF = first_B.unsqueeze(1) + frame_F * P
        sees_BFT = position_T < first_BF.unsqueeze(-1)
        for block in self.blocks:
            tokens_BFPD = block(tokens_BFPD, hidden_BTD, sees_BFT)
        output_BFPX = self.velocity_of_patch[modality](tokens_BFPD).float()
        output_BFPX = output_BFPX + self.share_of_input(tokens_BFPD).float() * noisy_BFPX
        of_input, of_output = _preconditioning(time_BF[..., None, None] / NUM_TIMES)
        return of_input * noisy_BFPX + of_output * output_BFPX

    @torch.no_grad()
    def sample(
        self,
        modality: str,
        frame: int,
        context: Context,
        key: Tensor,
        num_steps: int,
        uncaptioned: Context | None = None,
        guidance: float = 1.0,
    ) -> Tensor:
        """Values, float32 [B, P, X], of one frame by `num_steps` Euler steps (a divisor of 64).

        With `uncaptioned`, the same frames without their caption before them, velocities go
        `guidance` times as far from its own as the context's do (classifier-free guidance, Ho and
        Salimans 2022).
        """
        grid, device = self.grids[modality], key.device
        B, P, X = len(context.hidden_BTD), grid.patches_per_frame, grid.patch_values
        values_BFPX = gaussian(B * P * X, key).view(B, 1, P, X)
        frame_F = torch.tensor([frame], device=device)
        for i in range(num_steps):
            time_BF = torch.full((B, 1), i * NUM_TIMES // num_steps, device=device)
            velocity = self(modality, values_BFPX, time_BF, frame_F, *context)
            if uncaptioned is not None:
                plain = self(modality, values_BFPX, time_BF, frame_F, *uncaptioned)
                velocity = plain + guidance * (velocity - plain)
            values_BFPX = values_BFPX + velocity / num_steps
        return values_BFPX.squeeze(1)


class DenoiserBlock(nn.Module):
    """A frame's patches attend to one another, then to the states before; a gated feed-forward."""

    def __init__(
        self,
        width: int,
        num_layers: int,
        head_width: int,
        feed_forward_width: int,
        activation: str,
    ):
        super().__init__()
        self.head_width = head_width
        # Three residual branches a layer: their sum keeps the variance of the stream.
        gain = (3 * num_layers) ** -0.5
        self.query_key_value = TernaryLinear(width, 3 * width, activation)
        self.mix = TernaryLinear(width, width, activation, gain=gain)
        self.context_query = TernaryLinear(width, width, activation)
        self.context_key_value = TernaryLinear(width, 2 * width, activation)
        self.context_mix = TernaryLinear(width, width, activation, gain=gain)
        self.gate_and_up = TernaryLinear(width, 2 * feed_forward_width, activation)
        self.down = TernaryLinear(feed_forward_width, width, activation, gain=gain, gated=True)

    def forward(self, tokens_BFPD: Tensor, hidden_BTD: Tensor, sees_BFT: Tensor) -> Tensor:
        B, num_frames, P, _ = tokens_BFPD.shape
        projected_BFPC, tokens_BFPD = self.query_key_value.fork(tokens_BFPD)
        query, key, value = projected_BFPC.flatten(0, 1).chunk(3, dim=-1)
        mixed_SPD = self._attend(query, key, value, None)
        tokens_BFPD = tokens_BFPD + self.mix(mixed_SPD.unflatten(0, (B, num_frames)))

        query_BFPD, tokens_BFPD = self.context_query.fork(tokens_BFPD)
        key_BTD, value_BTD = self.context_key_value(hidden_BTD).chunk(2, dim=-1)
        sees_BQK = sees_BFT.repeat_interleave(P, dim=1)
        mixed_BQD = self._attend(query_BFPD.flatten(1, 2), key_BTD, value_BTD, sees_BQK)
        tokens_BFPD = tokens_BFPD + self.context_mix(mixed_BQD.unflatten(1, (num_frames, P)))

        gate_and_up_BFPG, tokens_BFPD = self.gate_and_up.fork(tokens_BFPD)
        return tokens_BFPD + self.down(gate_and_up_BFPG)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, sees_BQK: Tensor | None) -> Tensor:
        """[B, Q, D] of queries [B, Q, D] and keys and values [B, K, D]; gain-free norms bound the
        logits. torch's plain path is the one that is deterministic with a mask."""
        query, key, value = (
            x.unflatten(-1, (-1, self.head_width)).transpose(1, 2) for x in (query, key, value)
        )
        query, key = (F.rms_norm(x, (self.head_width,)) for x in (query, key))
        mask = None if sees_BQK is None else sees_BQK.unsqueeze(1)
        with sdpa_kernel(SDPBackend.MATH):
            mixed_BNQH = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return mixed_BNQH.transpose(1, 2).flatten(2)


def slot_times(count: int, key: Tensor) -> Tensor:
    """int64 [count] in 0 .. NUM_TIMES - 1: a random start and then a fixed stride."""
    order = torch.arange(count, device=key.device)
    return (uniform_words(1, ~key).long() + TIME_STRIDE * order) % NUM_TIMES


def _preconditioning(share: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b) of v = a x + b F at times `share`, 0..1."""
    variance = SECOND_MOMENT * share.square() + (1 - share).square()
    return (SECOND_MOMENT * share - (1 - share)) / variance, (SECOND_MOMENT / variance).sqrt()
