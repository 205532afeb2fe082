"""What models of field interactions share: all fields and pair numbers as vectors, the linear part, and the tower.

B requests, t candidates end to end, F = Fr + Fc fields of request and candidate, D width of a vector, T tasks, P pair fields, K numbers
that stand for one of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from shortlist.data.batches import Batch, Candidates
from shortlist.data.schema import Space
from shortlist.layers.field_matrix import FieldMatrix, FieldsConfig, field_names
from shortlist.layers.scoring import HeadConfig, PairFeatures, make_tower


class PairVectors(nn.Module):
    """Each pair field as a vector: a linear map of its number and ramps (see PairFeatures), so a curve per dimension."""

    def __init__(self, space: Space, num_bins: int, dim: int) -> None:
        super().__init__()
        self.pair = PairFeatures(space.pair_fields, num_bins)
        self.num_fields, self.numbers = len(space.pair_fields), 1 + num_bins
        self.weight_PKD = nn.Parameter(torch.randn(self.num_fields, self.numbers, dim) * 0.1)

    @property
    def flops(self) -> int:
        """Per candidate."""
        return 2 * self.weight_PKD.numel()

    def keep(self, names: Collection[str]) -> None:
        """Read only the fields of these names from now on; their curves stay as they are."""
        kept = [place for place, name in enumerate(self.pair.names) if name in names]
        self.pair.keep(names)
        self.num_fields = len(kept)
        self.weight_PKD = nn.Parameter(self.weight_PKD.detach()[kept].clone())

    def forward(self, pair: Mapping[str, Tensor], num_rows: int) -> Tensor:
        """float32 [t, P, D] from columns [t]."""
        flat = self.pair(pair, num_rows)
        ramps_tPK = flat[:, self.num_fields :].view(num_rows, self.num_fields, self.numbers - 1)
        number_tPK = torch.cat([flat[:, : self.num_fields, None], ramps_tPK], dim=2)
        return torch.einsum("tpk,pkd->tpd", number_tPK, self.weight_PKD)


class FieldBlock(nn.Module):
    """All fields of a request and a candidate as vectors, pair fields last."""

    def __init__(self, space: Space, dim: int, fields: FieldsConfig, head: HeadConfig) -> None:
        super().__init__()
        names = fields.names or field_names(space, user=head.use_user_ids, history=fields.use_history)
        self.matrix = FieldMatrix(
            space, dim, names, max_history=fields.max_history, id_dropout=head.id_dropout, table=fields.table
        )
        self.pair = PairVectors(space, head.pair_bins, dim)
        self.dim = dim
        self.num_request = self.matrix.num_request
        self.num_candidate = self.matrix.num_candidate + self.pair.num_fields
        self.num_fields = self.num_request + self.num_candidate

    def request(self, batch: Batch) -> Tensor:
        """float32 [B, Fr, D]."""
        return self.matrix.request(batch)

    def candidate(self, candidates: Candidates) -> Tensor:
        """float32 [t, Fc, D]."""
        rows = candidates.rows.values
        return torch.cat([self.matrix.candidate(rows), self.pair(candidates.pair, len(rows))], dim=1)

    @property
    def candidate_flops(self) -> int:
        """Per candidate."""
        return self.matrix.candidate_flops + self.pair.flops

    def request_flops(self, num_history: int) -> int:
        """Per request."""
        return self.matrix.request_flops(num_history)

    def bytes_read(self, num_history: int, num_candidates: int, *, cached: bool) -> float:
        """Of table rows, as float32."""
        return 4.0 * self.dim * self.matrix.rows_read(num_history, num_candidates, cached=cached)


class LinearPart(nn.Module):
    """One weight per field value and task, and a bias per task: sums that split into request and candidate."""

    def __init__(self, space: Space, fields: FieldsConfig, head: HeadConfig) -> None:
        super().__init__()
        self.weights = FieldBlock(space, len(space.tasks), fields, head)
        self.bias_T = nn.Parameter(torch.zeros(len(space.tasks)))

    def request(self, batch: Batch) -> Tensor:
        """float32 [B, T], bias included."""
        return self.weights.request(batch).sum(1) + self.bias_T

    def candidate(self, candidates: Candidates) -> Tensor:
        """float32 [t, T]."""
        return self.weights.candidate(candidates).sum(1)


class DeepPart(nn.Module):
    """The tower over all field vectors and `extra` more numbers per candidate, with gates and generated weights where they are on."""

    def __init__(self, space: Space, fields: FieldBlock, head: HeadConfig, extra: tuple[int, ...] = ()) -> None:
        super().__init__()
        D = fields.dim
        self.tower = make_tower(space, [D] * fields.num_request, [D] * fields.num_candidate + list(extra), head)
        self.request_flops, self.candidate_flops = self.tower.request_flops, self.tower.candidate_flops

    def request(self, request_BFD: Tensor, batch: Batch) -> Tensor:
        """float32 [B, W]: what the request alone decides."""
        return self.tower.request_side(request_BFD.flatten(1), batch)

    def forward(self, request_BW: Tensor, candidate_tFD: Tensor, candidates: Candidates, *extra_tX: Tensor) -> Tensor:
        """Logits [t, T]."""
        rows = candidates.rows
        side_tV = torch.cat([candidate_tFD.flatten(1), *extra_tX], dim=1)
        return self.tower(request_BW, side_tV, rows.row_of_value, rows.values)
