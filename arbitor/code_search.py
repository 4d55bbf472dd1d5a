"""The code of the largest cosine with a position: exact, or among candidates of a sign hash.

Shape letters: M positions, m positions of a piece, C code width, V codes, H hash tables, K bits of
a key, N candidates of a position.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from arbitor.kernel.latent_update.fixed_point import counter_hash

EXACT_CODES = 65_536  # with more of them, candidates alone are compared
NUM_TABLES = 32
KEY_BITS = 31
CANDIDATES = 64  # of a table
_PLANES_KEY = 0x5160  # of the hash that draws the planes: any constant
_PIECE_ELEMENTS = 1 << 24  # numbers that exist at a time


def nearest_codes(searched_MC: Tensor, codebook_VC: Tensor) -> Tensor:
    """int64 [M]: the row of the largest cosine with each position, the first among equal ones."""
    unit_VC = F.normalize(codebook_VC.float(), dim=-1)
    search = _exact if len(codebook_VC) <= EXACT_CODES else _among_candidates
    return search(searched_MC, unit_VC)


def _exact(searched_MC: Tensor, unit_VC: Tensor) -> Tensor:
    num_codes = len(unit_VC)
    size = max(1, min(num_codes, _PIECE_ELEMENTS // len(searched_MC)))
    best_M, code_M = (searched_MC @ unit_VC[:size].T).max(dim=-1)
    for start in range(size, num_codes, size):
        score_M, index_M = (searched_MC @ unit_VC[start : start + size].T).max(dim=-1)
        code_M = torch.where(score_M > best_M, index_M + start, code_M)
        best_M = torch.maximum(score_M, best_M)
    return code_M


def _among_candidates(searched_MC: Tensor, unit_VC: Tensor) -> Tensor:
    """Of each table the codes whose keys stand next to the position's in order.

    Keys are the sides of random planes, so neighbours in order are those that agree in the longest
    run of first planes: an LSH forest (Bawa et al. 2005). Every position has as many candidates,
    whatever the others look for.
    """
    planes_CX = _planes(unit_VC.shape[1], unit_VC.device)
    key_HV, code_HV = _keys(unit_VC, planes_CX).sort(dim=1, stable=True)
    key_HM = _keys(searched_MC, planes_CX)
    first_HM = torch.searchsorted(key_HV, key_HM) - CANDIDATES // 2
    first_HM = first_HM.clamp(0, len(unit_VC) - CANDIDATES)
    offset = torch.arange(CANDIDATES, device=unit_VC.device)
    size = max(1, _PIECE_ELEMENTS // (NUM_TABLES * CANDIDATES * unit_VC.shape[1]))
    codes = []
    pieces = zip(searched_MC.split(size), first_HM.split(size, dim=1), strict=True)
    for searched_mC, first_Hm in pieces:
        place_HX = (first_Hm.unsqueeze(-1) + offset).flatten(1)
        candidate_mN = code_HV.gather(1, place_HX).unflatten(1, (-1, CANDIDATES))
        candidate_mN = candidate_mN.transpose(0, 1).flatten(1).sort(dim=1).values
        score_mN = (unit_VC[candidate_mN] @ searched_mC.unsqueeze(-1)).squeeze(-1)
        codes.append(candidate_mN.gather(1, score_mN.argmax(dim=1, keepdim=True)).squeeze(1))
    return torch.cat(codes)


def _planes(width: int, device: torch.device) -> Tensor:
    """float32 [C, H K] of odd integers from -255 to 255, the same always."""
    index = torch.arange(width * NUM_TABLES * KEY_BITS, dtype=torch.int32, device=device)
    return ((counter_hash(index, _PLANES_KEY) & 255) * 2 - 255).float().view(width, -1)


def _keys(x_MC: Tensor, planes_CX: Tensor) -> Tensor:
    """int64 [H, M]: a bit a plane, the first plane's the highest."""
    side_MHK = (x_MC.float() @ planes_CX > 0).unflatten(1, (NUM_TABLES, KEY_BITS))
    place_K = torch.arange(KEY_BITS - 1, -1, -1, device=x_MC.device)
    return (side_MHK.long() << place_K).sum(dim=-1).T.contiguous()
