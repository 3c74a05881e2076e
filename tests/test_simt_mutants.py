"""The emulated tests can fail: every mutant of the kernels is caught.

A barrier whose removal nobody notices is either not needed, or not tested.
"""

from __future__ import annotations

import os
import shutil
from typing import Any

import pytest

np = pytest.importorskip("numpy")
pytest.importorskip("pybind11")
from simt import build  # noqa: E402
from simt.compact import find_fault  # noqa: E402
from simt.harness import library  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not build.has_compiler(), reason="no C++ compiler"),
    pytest.mark.slow,
]

DTYPE = "bfloat16"  # eight columns a vector, and every kind of misalignment
# A file of csrc/cuda, a text that it holds once, and what takes its place: MUTANT is true in this
# mutant and false in every other, so that one library holds them all.
MUTANTS = {
    "a skewed load without its second half": (
        "device/vector.cuh",
        "high = simt::load_words(",
        "high = MUTANT ? low : simt::load_words(",
    ),
    "no tail": (
        "device/vector.cuh",
        "singles = head + (count - tail);",
        "singles = head + (MUTANT ? 0 : count - tail);",
    ),
    "no head": ("device/vector.cuh", "i < head ? i :", "i < head ? (MUTANT ? tail : i) :"),
    "a vector too many": (
        "device/vector.cuh",
        "vectors = (count - head) / Vector<T>::size;",
        "vectors = (count - head) / Vector<T>::size + (MUTANT ? 1 : 0);",
    ),
    "a batch read beyond the end": (
        "kernels/chunks.cuh",
        "if (batch + batch_columns<T> <= end && columns.is_inside",
        "if ((MUTANT ? batch < end : batch + batch_columns<T> <= end) && columns.is_inside",
    ),
    "a vector counted beyond the end": (
        "device/vector.cuh",
        "return column + V::size <= to && is_inside(",
        "return (MUTANT ? column < to : column + V::size <= to) && is_inside(",
    ),
    "the last column not counted": (
        "device/vector.cuh",
        "if (column + i < to) elements",
        "if (column + i < to - (MUTANT ? 1 : 0)) elements",
    ),
    "a missing column asked for": (
        "kernels/chunks.cuh",
        "exponents[v] += is_plain || v * stride + i < to_end ?",
        "exponents[v] += is_plain || MUTANT || v * stride + i < to_end ?",
    ),
    "a missing column capped": (
        "kernels/chunks.cuh",
        "if (!(v * stride + i < to_end)) x[v][i]",
        "if (!MUTANT && !(v * stride + i < to_end)) x[v][i]",
    ),
    "the target in the sum of the others": (
        "kernels/chunks.cuh",
        "const bool is_target = !is_plain &&",
        "const bool is_target = !MUTANT && !is_plain &&",
    ),
    "the target's batch as any other": (
        "kernels/chunks.cuh",
        "if (batch + batch_columns<T> <= end && !has_target) {",
        "if (batch + batch_columns<T> <= end && (MUTANT || !has_target)) {",
    ),
    "the target not hidden": (
        "kernels/chunks.cuh",
        "if (has_target) {",
        "if (!MUTANT && has_target) {",
    ),
    "another element hidden": (
        "device/vector.cuh",
        "if (k == i) from_real(",
        "if (k == (MUTANT ? i + 1 : i)) from_real(",
    ),
    "no order among equal logits": (
        "kernels/chunks.cuh",
        "const bool wins_ties = before_v + i < to_target;",
        "const bool wins_ties = !MUTANT && before_v + i < to_target;",
    ),
    "ties with the target in another batch": (
        "kernels/chunks.cuh",
        "to_target > 0 ? target_logit :",
        "to_target > 0 && !MUTANT ? target_logit :",
    ),
    "no ties with the target in another batch": (
        "kernels/chunks.cuh",
        "next_above(target_logit);",
        "(MUTANT ? target_logit : next_above(target_logit));",
    ),
    "a target that is read at the end not read": (
        "kernels/row_stats.cuh",
        "if constexpr (!reads_early) stored = {in, row, target};",
        "if constexpr (!reads_early) {\n    if (!MUTANT) stored = {in, row, target};\n  }",
    ),
    "a gradient without its square": (
        "kernels/gradient.cuh",
        "by_exp = p_of_exp * p_of_exp * row.c.sq_over_sum;",
        "by_exp = MUTANT ? Real(0) : p_of_exp * p_of_exp * row.c.sq_over_sum;",
    ),
    "a gradient without its logarithm": (
        "kernels/gradient.cuh",
        "by_exponent = p_of_exp * (row.c.plogp * unit);",
        "by_exponent = p_of_exp * (row.c.plogp * (MUTANT ? Real(1) : unit));",
    ),
    "a capped vector as a scaled one": (
        "kernels/gradient.cuh",
        "} else if (transform.cap > 0) {  // one",
        "} else if (!MUTANT && transform.cap > 0) {  // one",
    ),
    "sums not moved to a new maximum": (
        "kernels/chunks.cuh",
        "return factor;",
        "return MUTANT ? Real(1) : factor;",
    ),
    "the target not found in a vector": (
        "kernels/gradient.cuh",
        "const bool is_mine = (target_vector - first) % part.threads == 0;",
        "const bool is_mine = !MUTANT && (target_vector - first) % part.threads == 0;",
    ),
    "one group's pieces by all": (
        "kernels/gradient.cuh",
        "int first = part.index * piece + part.thread;",
        "int first = (MUTANT ? 0 : part.index) * piece + part.thread;",
    ),
    "the last chunk not merged": (
        "kernels/chunks.cuh",
        "copy_fields(chunks[i], chunk, wanted);",
        "if (!MUTANT || i + 1 < count) copy_fields(chunks[i], chunk, wanted);",
    ),
    "the last chunk not reduced": (
        "kernels/row_stats.cuh",
        "chunk < chunks.count; chunk += share.warps()",
        "chunk < chunks.count - (MUTANT ? 1 : 0); chunk += share.warps()",
    ),
    "rows beyond the last": (
        "kernels/row_stats.cuh",
        "if (row >= in.rows) return;  // a warp",
        "if (!MUTANT && row >= in.rows) return;  // a warp",
    ),
    "the target's column as any other": (
        "kernels/gradient.cuh",
        "if (found.is_here) from_real",
        "if (!MUTANT && found.is_here) from_real",
    ),
    "no zeros behind the vocabulary": (
        "kernels/fused.cuh",
        "if (rank == blocks - 1) write_zeros",
        "if (rank == (MUTANT ? blocks : blocks - 1)) write_zeros",
    ),
    "states for the own block only": (
        "kernels/fused.cuh",
        "if (simt::lane() < blocks) {",
        "if (MUTANT ? simt::lane() == rank : simt::lane() < blocks) {",
    ),
    "a chunk not copied": (
        "kernels/fused.cuh",
        "for (chunk += warps; chunk < staged_chunk; chunk += warps) staged",
        "for (chunk += warps; chunk < staged_chunk - (MUTANT ? 1 : 0); chunk += warps) staged",
    ),
    "what does not fit in shared memory not written": (
        "kernels/fused.cuh",
        "if (staged_end < end) {",
        "if (!MUTANT && staged_end < end) {",
    ),
    "the last of equal logits": (
        "kernels/chunks.cuh",
        "place = x[v][i] == largest ? i : place;",
        "place = x[v][i] == largest && !(MUTANT && place > 0) ? i : place;",
    ),
    "a squared sum moved once": (
        "kernels/chunks.cuh",
        "state.sum_sq_exp *= factor * factor;",
        "state.sum_sq_exp *= MUTANT ? factor : factor * factor;",
    ),
    "an entropy's sum not moved": (
        "kernels/chunks.cuh",
        "state.sum_x_exp = factor == Real(0) ? Real(0) : moved;",
        "if (!MUTANT) state.sum_x_exp = factor == Real(0) ? Real(0) : moved;",
    ),
    "a mean's sum not moved": (
        "kernels/chunks.cuh",
        "fma_of(state.sum_weights, reference_before - state.reference(), state.sum_weighted);",
        "fma_of(MUTANT ? Real(0) : state.sum_weights, reference_before - state.reference(),\n"
        "                 state.sum_weighted);",
    ),
    "a weight of the column before": (
        "kernels/chunks.cuh",
        "? in.weights.at(row, column) : Real(0)",
        "? in.weights.at(row, column - (MUTANT ? i : 0)) : Real(0)",
    ),
    "equal weights not multiplied in": (
        "kernels/chunks.cuh",
        "state.sum_weighted *= in.weights.beta;",
        "state.sum_weighted *= MUTANT ? Real(1) : in.weights.beta;",
    ),
    "no entropy in a copied state": (
        "kernels/chunks.cuh",
        "if (wanted.floats[Stat::entropy]) to.sum_x_exp",
        "if (!MUTANT && wanted.floats[Stat::entropy]) to.sum_x_exp",
    ),
    "no squares in a copied state": (
        "kernels/chunks.cuh",
        "if (wanted.floats[Stat::log_sum_sq_probs]) to.sum_sq_exp",
        "if (!MUTANT && wanted.floats[Stat::log_sum_sq_probs]) to.sum_sq_exp",
    ),
    "no mean in a copied state": (
        "kernels/chunks.cuh",
        "if (wanted.floats[Stat::mean_log_prob]) {",
        "if (!MUTANT && wanted.floats[Stat::mean_log_prob]) {",
    ),
    "no order in a copied state": (
        "kernels/chunks.cuh",
        "if (wanted.order()) {",
        "if (!MUTANT && wanted.order()) {",
    ),
    "pieces that overlap": (
        "kernels/gradient.cuh",
        "first += part.count * piece) {",
        "first += part.count * piece - (MUTANT ? part.threads : 0)) {",
    ),
    "single elements by every group": (
        "kernels/gradient.cuh",
        "if (part.index == 0) {",
        "if (MUTANT || part.index == 0) {",
    ),
    "another column for the target": (
        "kernels/gradient.cuh",
        "if (is_mine) found = {to_real(*logits.at(target)), true};",
        "if (is_mine) found = {to_real(*logits.at(MUTANT ? begin : target)), true};",
    ),
    "no logit for a target beside the vectors": (
        "kernels/gradient.cuh",
        "if (column == target) found = {z, true};",
        "if (column == target) found = {MUTANT ? Real(0) : z, true};",
    ),
    "an unaligned copy as an aligned one": (
        "kernels/gradient.cuh",
        "if (is_aligned || skew_of(out) ==",
        "if (MUTANT || is_aligned || skew_of(out) ==",
    ),
    "the gradient of a capped logit not chained": (
        "kernels/gradient.cuh",
        "return g * logit.dx_dz;",
        "return MUTANT ? g : g * logit.dx_dz;",
    ),
    "one weight for all columns of a gradient": (
        "kernels/gradient.cuh",
        ": in.weights.at(row, column);",
        ": in.weights.at(row, MUTANT ? 0 : column);",
    ),
    "the coefficients of another warp's row": (
        "kernels/row_grad.cuh",
        "(share.is_warp() ? simt::warp_index() : 0);",
        "(share.is_warp() && !MUTANT ? simt::warp_index() : 0);",
    ),
    "the coefficients by another warp": (
        "kernels/fused.cuh",
        "if (warp == 0) {",
        "if (warp == (MUTANT ? 1 : 0)) {",
    ),
    "the first chunk not copied": (
        "kernels/fused.cuh",
        "if (has_copies) staged.start(chunk);",
        "if (!MUTANT && has_copies) staged.start(chunk);",
    ),
    "an unaligned row waited for by its own warp": (
        "kernels/fused.cuh",
        "if (from_.skew() != 0 && chunk > first_chunk_) {",
        "if (!MUTANT && from_.skew() != 0 && chunk > first_chunk_) {",
    ),
    "the last vector of a chunk not copied": (
        "kernels/fused.cuh",
        "(first_vector(last) - first_vector(first)) * vector_bytes;",
        "(first_vector(last) - (MUTANT ? 1 : 0) - first_vector(first)) * vector_bytes;",
    ),
    "single elements not copied": (
        "kernels/fused.cuh",
        "if (at >= first && at < last) to_[at]",
        "if (!MUTANT && at >= first && at < last) to_[at]",
    ),
    "a chunk too many in shared memory": (
        "kernels/fused.cuh",
        "for (chunk = first_chunk + warp; chunk < staged_chunk; chunk += warps) {",
        "for (chunk = first_chunk + warp; chunk < staged_chunk + (MUTANT ? 1 : 0); "
        "chunk += warps) {",
    ),
    "a part that is not there written from shared memory": (
        "kernels/fused.cuh",
        "gradient.write(*coefficients, others,",
        "gradient.write(*coefficients, MUTANT ? columns : others,",
    ),
    "no values for a gradient that reads them": (
        "kernels/fused.cuh",
        "if (source.options.gradient_reads_values()) known",
        "if (!MUTANT && source.options.gradient_reads_values()) known",
    ),
    "a mean without its task": (
        "kernels/tasks.cuh",
        "if (wanted.floats[Stat::mean_log_prob]) needed",
        "if (!MUTANT && wanted.floats[Stat::mean_log_prob]) needed",
    ),
    "unequal weights as equal ones": (
        "kernels/tasks.cuh",
        "needed |= in.weights.is_constant() ? mean : rest;",
        "needed |= MUTANT || in.weights.is_constant() ? mean : rest;",
    ),
    "entropy without its task": (
        "kernels/tasks.cuh",
        "if (wanted.floats[Stat::entropy]) needed",
        "if (!MUTANT && wanted.floats[Stat::entropy]) needed",
    ),
    "squares without their task": (
        "kernels/tasks.cuh",
        "if (wanted.floats[Stat::log_sum_sq_probs]) needed",
        "if (!MUTANT && wanted.floats[Stat::log_sum_sq_probs]) needed",
    ),
    "order without its task": (
        "kernels/tasks.cuh",
        "if (wanted.order()) needed",
        "if (!MUTANT && wanted.order()) needed",
    ),
    "a gradient of entropy without its task": (
        "kernels/tasks.cuh",
        "if (Stat::needs_more_sums(stat) && source.has(stat)) needed",
        "if (!MUTANT && Stat::needs_more_sums(stat) && source.has(stat)) needed",
    ),
    "a gradient of unequal weights as of equal ones": (
        "kernels/tasks.cuh",
        "if (!in.weights.is_constant() && source",
        "if (!MUTANT && !in.weights.is_constant() && source",
    ),
    "a gradient of the scale without its task": (
        "kernels/tasks.cuh",
        "if (with_scale) needed",
        "if (!MUTANT && with_scale) needed",
    ),
    "a kernel that lacks a task": (
        "kernels/tasks.cuh",
        "if (is_found || task::has(needed, ~tasks)) return;",
        "if (is_found || (!MUTANT && task::has(needed, ~tasks))) return;",
    ),
    "gradient blocks of one row on the next": (
        "kernels/share.cuh",
        "int(simt::block_index_x() % unsigned(blocks_per_row)), blocks_per_row};",
        "int(simt::block_index_x() % unsigned(blocks_per_row + int(MUTANT))), blocks_per_row};",
    ),
    "a row of losses too many": (
        "kernels/reduce.cuh",
        "if (row < rows.rows) loss[row]",
        "if (MUTANT ? row <= rows.rows : row < rows.rows) loss[row]",
    ),
    "a copy not waited for": (
        "kernels/fused.cuh",
        "simt::wait_for(arrivals_ + (chunk - first_chunk_));",
        "if (!MUTANT) simt::wait_for(arrivals_ + (chunk - first_chunk_));",
    ),
    "statistics by nobody": (
        "kernels/fused.cuh",
        "rank == 0 && warp == warps - 1;",
        "rank == 0 && warp == warps - (MUTANT ? 0 : 1);",
    ),
    "the first held chunk left out": (
        "kernels/fused.cuh",
        "const int other_chunk = staged_chunk + warp;",
        "const int other_chunk = staged_chunk + warp + (MUTANT && holds ? 1 : 0);",
    ),
    "a held tile as if it were whole": (
        "kernels/gradient.cuh",
        "if (begin + tile_columns<T> <= end) {",
        "if (MUTANT || begin + tile_columns<T> <= end) {",
    ),
    "the target of a held tile by another lane": (
        "kernels/gradient.cuh",
        "(target - begin) / width % warp_size == simt::lane()",
        "(target - begin) / width % warp_size == simt::lane() + (MUTANT ? 1 : 0)",
    ),
    "sums that lack what their reference lacks": (
        "device/exponential.cuh",
        "return simt::fast_exp2(-lacking_);",
        "return MUTANT ? Real(1) : simt::fast_exp2(-lacking_);",
    ),
    "a mean that lacks what its reference lacks": (
        "device/exponential.cuh",
        "return fma_of(-lacking_, weights, weighted) * inverse_unit_;",
        "return fma_of(MUTANT ? Real(0) : -lacking_, weights, weighted) * inverse_unit_;",
    ),
    "a reference beyond the largest number": (
        "device/exponential.cuh",
        "const bool is_far = !(",
        "const bool is_far = !MUTANT && !(",
    ),
    "a mean over the denominator before it is counted": (
        "kernels/reduce.cuh",
        "counted.denominator = {denominator};",
        "if (!MUTANT) counted.denominator = {denominator};",
    ),
    "a chunk too few": (
        "launch/plan.h",
        "int(ceil_div(vocab_size, columns))}",
        "int(std::max<int64_t>((vocab_size + (MUTANT ? 0 : columns - 1)) / columns, 1))}",
    ),
}
MUTANT_H = """#pragma once
#include <cstdlib>
inline const int llmloss_mutant = std::atoi(std::getenv("LLMLOSS_MUTANT"));
"""


@pytest.fixture(scope="module")
def kernels() -> Any:
    return build.load(library(DTYPE))


def test_the_kernels_themselves_have_no_fault(kernels: Any) -> None:
    assert find_fault(kernels, DTYPE) is None


def test_every_barrier_and_shuffle_is_needed_and_tested(kernels: Any) -> None:
    """Each wait in the source is taken away in turn, each shuffle returns the own value."""
    assert find_fault(kernels, DTYPE) is None
    sites = kernels.sites()
    kinds = {kind for kind, *_ in sites}
    assert kinds == {"block_sync", "warp_sync", "cluster_sync", "cluster_arrive", "cluster_wait",
                     "shuffle_xor", "wait_for"}  # fmt: skip
    not_caught = []
    for kind, *place in sites:
        kernels.set_mutation(*place)
        if find_fault(kernels, DTYPE) is None:
            not_caught.append((kind, *place))
    kernels.set_mutation("", 0, 0)
    assert not not_caught
    assert len(sites) >= 20


@pytest.fixture(scope="module")
def mutants(tmp_path_factory: pytest.TempPathFactory) -> build.Library:
    """The kernels with every mutation in them, of which LLMLOSS_MUTANT chooses one, or none."""
    csrc = tmp_path_factory.mktemp("mutants") / "csrc"
    shutil.copytree(build.ROOT / "csrc", csrc, ignore=shutil.ignore_patterns("*.py"))
    (csrc / "mutant.h").write_text(MUTANT_H)
    for number, (file, text, other) in enumerate(MUTANTS.values()):
        path = csrc / "cuda" / file
        source = path.read_text()
        assert source.count(text) == 1, f"{file} holds the text {source.count(text)} times: {text}"
        source = source.replace(text, other.replace("MUTANT", f"(llmloss_mutant == {number})"))
        if "mutant.h" not in source:
            source = source.replace("#pragma once", '#pragma once\n#include "mutant.h"', 1)
        path.write_text(source)
    made = library(DTYPE, ("-O1", "-w"), csrc.parent, "simt_mutants")
    made.build()
    return made


@pytest.mark.parametrize("name", [None, *MUTANTS])
def test_every_mutant_is_caught(mutants: build.Library, name: str | None) -> None:
    number = -1 if name is None else list(MUTANTS).index(name)
    fault = find_fault_aside(mutants, number)
    assert fault is None if name is None else fault is not None


def find_fault_aside(lib: build.Library, number: int) -> str | None:
    """In a process of its own: a mutant may break more than its launch."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.environ["LLMLOSS_MUTANT"] = str(number)
            fault = find_fault(build.load(lib), DTYPE)
            os.write(writer, b"" if fault is None else b"!")
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    return None if told == b"" and status == 0 else "caught"
