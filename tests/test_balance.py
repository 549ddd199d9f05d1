"""Balance: the counts against a count made one by one, and MoGE's claim, which is exact."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moge_hal.backend import Backend
from moge_hal.bind import bind
from moge_hal.cli.balance import CALL, Balance, as_json, draw, measure
from moge_hal.config import preset
from moge_hal.errors import UserError
from moge_hal.runtime import Model
from moge_hal.training.init import initial_weights

# 24 experts in 4 groups of 6, 8 a token: two in every group, or any eight.
CONFIG = replace(
    preset("novels", vocab_size=300, num_experts_per_tok=8),
    num_hidden_layers=2,
    hidden_size=40,
    moe_intermediate_size=8,
    shared_expert_intermediate_size=16,
    max_position_embeddings=200,
)
TOKENS = 3 * CALL + 17  # one window of 192 tokens, and a rest that makes no whole call


@pytest.fixture(scope="module")
def model() -> Model:
    torch.set_num_threads(1)
    weights = initial_weights(replace(CONFIG, initializer_range=0.3), 7)
    return bind(CONFIG, weights, Backend())


@pytest.fixture(scope="module")
def ids() -> list[int]:
    generator = torch.Generator().manual_seed(3)
    found: list[int] = torch.randint(0, 300, (TOKENS,), generator=generator).tolist()
    return found


@pytest.fixture(scope="module")
def rows(model: Model, ids: list[int]) -> list[Balance]:
    return measure(model, ids)


def test_there_is_a_row_for_every_router_and_divisor(rows: list[Balance]) -> None:
    assert [(row.devices, row.router) for row in rows] == [
        (devices, router) for devices in (1, 2, 4) for router in ("MoGE", "top-k")
    ]
    assert all(len(row.load) == row.devices for row in rows)


def test_moge_is_balanced_exactly(rows: list[Balance]) -> None:
    for row in rows:
        if row.router == "MoGE":
            assert row.load == [1.0] * row.devices
            assert (row.busiest, row.score, row.worst) == (1.0, 0.0, 0.0)


def test_a_conventional_router_is_not(rows: list[Balance]) -> None:
    for row in rows:
        if row.router == "top-k" and row.devices > 1:
            assert sum(row.load) == pytest.approx(row.devices)
            assert max(row.load) > 1 and row.busiest > 1.01
            assert row.worst > row.score > 0.1


def test_the_numbers_are_those_of_a_count_one_by_one(
    model: Model, ids: list[int], rows: list[Balance]
) -> None:
    """The router's logits are those of the model run whole; the top-k is taken by sorting."""
    run = bind(CONFIG, model.weights, Backend(), "train").run_step
    with torch.no_grad():
        out = run(torch.tensor([ids[:192]]), torch.arange(192)[None], None)
    assert out.router_logits is not None
    chosen = {
        "MoGE": out.routes.tolist(),
        "top-k": [
            [sorted(range(24), key=lambda e: (-token[e], e))[:8] for token in layer.tolist()]
            for layer in out.router_logits
        ],
    }
    for row in rows:
        total = [0] * row.devices
        busiest, scores = [], []
        for layer in chosen[row.router]:
            for call in range(3):
                load = [0] * row.devices
                for token in layer[call * CALL : (call + 1) * CALL]:
                    for expert in token:
                        load[expert // (24 // row.devices)] += 1
                total = [a + b for a, b in zip(total, load, strict=True)]
                busiest.append(max(load) * row.devices / sum(load))
                scores.append((max(load) - min(load)) / CALL)
        assert sum(total) == 2 * 192 * 8
        assert row.load == pytest.approx([t * row.devices / sum(total) for t in total])
        assert row.busiest == pytest.approx(sum(busiest) / 6)
        assert row.score == pytest.approx(sum(scores) / 6)
        assert row.worst == max(scores)


def test_longer_text_is_read_in_windows(model: Model, ids: list[int], rows: list[Balance]) -> None:
    """Windows are read apart, so the same window twice changes no mean."""
    for row, twice in zip(rows, measure(model, ids[:192] * 2), strict=True):
        assert twice.score == pytest.approx(row.score) and twice.worst == row.worst
        assert twice.load == pytest.approx(row.load)


def test_one_call_is_enough_and_less_is_refused(model: Model, ids: list[int]) -> None:
    assert measure(model, ids[:CALL])[0].score == 0
    with pytest.raises(UserError, match="the text has 63 tokens; balance needs at least 64"):
        measure(model, ids[: CALL - 1])


def test_a_short_context_is_refused(ids: list[int]) -> None:
    config = replace(CONFIG, max_position_embeddings=63)
    short = bind(config, initial_weights(config, 7), Backend())
    with pytest.raises(UserError, match="needs a context of at least 64 tokens"):
        measure(short, ids)


def test_a_model_without_its_weights_is_refused(model: Model, ids: list[int]) -> None:
    opened = copy.copy(model)
    opened.weights = {}
    with pytest.raises(UserError, match="opened without its weights"):
        measure(opened, ids)


def test_the_numbers_are_json(rows: list[Balance]) -> None:
    found = json.loads(json.dumps(as_json(rows)))
    assert [Balance(**row) for row in found] == rows


def test_the_picture_is_written_whole_or_not_at_all(rows: list[Balance], tmp_path: Path) -> None:
    path = tmp_path / "new" / "balance.png"
    draw(rows, path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG") and data.endswith(b"IEND\xaeB`\x82")
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    assert (width, height) == (1500, 600)
    draw(rows, path)  # again, over it
    assert [p.name for p in path.parent.iterdir()] == ["balance.png"]
    with pytest.raises(UserError, match="cannot be written"):
        draw(rows, path / "below-a-file.png")
    with pytest.raises(UserError, match="cannot be written"):
        draw(rows, path.parent)
    assert [p.name for p in tmp_path.rglob("*")] == ["new", "balance.png"]


def test_one_group_can_be_drawn(tmp_path: Path, rows: list[Balance]) -> None:
    draw([row for row in rows if row.devices == 1], tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 10_000
