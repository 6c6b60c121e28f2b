"""Arrivals from files and generators have the times, rates and lengths that were asked for."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.errors import UserError
from moeless.workloads.arrivals import ArrivalSeries, load, parse_window, to_requests

AZURE_2023 = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:15:46.6805900,374,44\r\n"
    "2023-11-16 18:15:50.9951690,396,109\r\n"
)
AZURE_2024 = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2024-05-10 00:00:00.009930+00:00,2162,5\n"
    "2024-05-10 00:00:01+00:00,2399,6\n"
)
BURST = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,472,18,490,Conversation log\n45,ChatGPT,1087,0,1087,API log\n118.5,GPT-4,417,276,693,API log\n"
)
BURST_LATER = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "900,s1,2.5,GPT-4,10,20,30,x\n899,s2,1.0,GPT-4,11,21,32,x\n"
)
MOONCAKE = (
    '{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}\n'
    '{"timestamp": 3000, "input_length": 7322, "output_length": 490, "hash_ids": [0]}\n'
)
BAILIAN = (
    '{"chat_id": 1, "parent_chat_id": -1, "timestamp": 61.114, "input_length": 9, "output_length": 3, '
    '"type": "text", "turn": 1, "hash_ids": [1]}\n'
    '{"chat_id": 2, "parent_chat_id": 1, "timestamp": 62.114, "input_length": 12, "output_length": 4, '
    '"type": "text", "turn": 2, "hash_ids": [1, 2]}\n'
)


@pytest.mark.parametrize(
    ("name", "content", "times", "prompt", "output"),
    [
        ("azure23.csv", AZURE_2023, [0, 4.314579], [374, 396], [44, 109]),
        ("azure24.csv", AZURE_2024, [0, 0.99007], [2162, 2399], [5, 6]),
        ("burst.csv", BURST, [0, 113.5], [472, 417], [18, 276]),
        ("burst2.csv", BURST_LATER, [0, 1], [11, 10], [21, 20]),
        ("mooncake.jsonl", MOONCAKE, [0, 3.0], [6758, 7322], [500, 490]),
        ("bailian.jsonl", BAILIAN, [0, 1.0], [9, 12], [3, 4]),
        ("plain.csv", "arrival,prompt_tokens,output_tokens\n2.5,1,2\n4,3,4\n", [0, 1.5], [1, 3], [2, 4]),
    ],
)
def test_every_published_layout_is_read_by_its_columns(
    tmp_path: Path, name: str, content: str, times: list[float], prompt: list[int], output: list[int]
):
    (tmp_path / name).write_bytes(content.encode())
    series = load(tmp_path / name)
    np.testing.assert_allclose(series.time_N, times, atol=1e-6)
    assert series.prompt_N.tolist() == prompt
    assert series.output_N.tolist() == output


def test_failed_requests_are_dropped_and_counted(tmp_path: Path):
    (tmp_path / "burst.csv").write_text(BURST)
    assert load(tmp_path / "burst.csv").notes == {"dropped_without_tokens": 1}


def test_a_file_of_times_only_has_no_lengths(tmp_path: Path):
    (tmp_path / "times.csv").write_text("arrival\n0\n1\n")
    series = load(tmp_path / "times.csv")
    assert series.prompt_N is None
    with pytest.raises(UserError, match="arrival times only"):
        to_requests(series)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.csv", "", "is no known request trace"),
        ("a.csv", "x,y\n1,2\n", "is no known request trace"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n", "holds no request"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n", "not a date and time"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,many,2\n", "not a readable CSV"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,1\n", "not a readable CSV"),
        ("a.csv", "arrival,prompt_tokens,output_tokens\nsoon,1,2\n", "not a number of seconds"),
        ("a.csv", "arrival,prompt_tokens,output_tokens\n1,,2\n", "empty cell"),
        ("a.csv", "arrival,prompt_tokens,output_tokens\n1,-3,2\n", "not a whole number of tokens"),
        ("a.csv", "arrival,prompt_tokens,output_tokens\nnan,3,2\n", "not a finite number"),
        ("a.csv", "arrival,prompt_tokens,output_tokens\n1,0,2\n", "no request with prompt and output"),
        ("a.jsonl", '{"timestamp": 0}\n', "line 1 needs numbers"),
        ("a.jsonl", MOONCAKE + "{broken\n", "line 3 is not valid JSON"),
    ],
)
def test_a_broken_file_gives_one_sentence(tmp_path: Path, name: str, content: str, sentence: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(sentence)) as caught:
        load(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "options", "sentence"),
    [
        ("nowhere.csv", {}, "neither an existing file nor one of azure-like"),
        ("poisson", {}, "not of the form poisson:RATE"),
        ("poisson:fast", {}, "with numbers"),
        ("poisson:0", {}, "positive"),
        ("gamma:1", {}, "not of the form gamma:RATE:SHAPE"),
        ("gamma:1:-2", {}, "positive"),
        ("on-off:1:2", {}, "not of the form on-off:RATE:ON:OFF"),
        ("azure-like:3", {}, "not of the form azure-like"),
        ("azure-like", {"request_rate": -1.0}, "positive"),
        ("constant:1", {"burstiness": 2.0}, "burstiness shapes poisson and gamma"),
        ("constant:1", {"window": (0.0, 1.0)}, "a window applies to"),
        ("poisson:1", {"num_requests": None}, "need a number of requests or a duration"),
        ("poisson:1", {"num_requests": 0}, "at least 1"),
        ("poisson:1", {"time_scale": 0.0}, "must be a positive number"),
        ("poisson:1", {"time_scale": 2.0, "request_rate": 3.0}, "give one of them"),
    ],
)
def test_a_wrong_specification_gives_one_sentence(spec: str, options: dict, sentence: str):
    with pytest.raises(UserError, match=re.escape(sentence)):
        load(spec, **{"num_requests": 5, **options})


@pytest.mark.parametrize(
    ("spec", "rate", "variation"),
    [
        ("poisson:5", 5, 1.0),
        ("gamma:8:0.25", 8, 4.0),
        ("gamma:8:4", 8, 0.25),
        ("constant:2", 2, 0.0),
    ],
)
def test_generators_have_the_rate_and_burstiness_they_are_named_for(spec: str, rate: float, variation: float):
    series = load(spec, num_requests=40_000, seed=1)
    assert series.rate == pytest.approx(rate, rel=0.04)
    assert series.burstiness == pytest.approx(variation, abs=0.08 * max(variation, 1))


def test_on_off_is_silent_while_off_and_keeps_its_mean_rate():
    series = load("on-off:5:2:8", duration=4000, seed=2)
    assert len(series) / 4000 == pytest.approx(5, rel=0.05)
    assert (series.time_N % 10 <= 2).all()


def test_options_replace_the_specifications_rate_and_shape():
    asked = load("poisson:1", num_requests=5000, request_rate=20, burstiness=0.5)
    same = load("gamma:20:0.5", num_requests=5000)
    np.testing.assert_allclose(asked.time_N, same.time_N)
    assert load("poisson", request_rate=3, num_requests=4).name == "poisson"


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["poisson:3", "gamma:3:0.2", "constant:3", "on-off:3:5:5", "azure-like"]),
    st.integers(1, 300),
    st.integers(0, 1000),
)
def test_generated_arrivals_ascend_and_repeat_by_seed(spec: str, count: int, seed: int):
    series = load(spec, num_requests=count, seed=seed)
    assert len(series) == count
    assert series.time_N[0] >= 0
    assert (np.diff(series.time_N) >= 0).all()
    np.testing.assert_array_equal(series.time_N, load(spec, num_requests=count, seed=seed).time_N)


@pytest.mark.parametrize("spec", ["poisson:4", "on-off:4:3:3", "azure-like"])
def test_a_duration_ends_generated_arrivals(spec: str):
    series = load(spec, duration=60)
    assert series.time_N[-1] < 60
    assert len(load(spec, duration=60, num_requests=7)) == 7
    assert 30 < load(spec, duration=60, time_scale=0.5).time_N[-1] < 60


def test_window_scale_rate_and_head():
    series = ArrivalSeries("s", np.arange(0.0, 10.0), np.arange(1, 11), np.arange(1, 11))
    part = series.window(2.5, 6)
    np.testing.assert_allclose(part.time_N, [0.5, 1.5, 2.5])
    assert part.prompt_N.tolist() == [4, 5, 6]
    assert series.at_rate(4).rate == pytest.approx(4)
    np.testing.assert_allclose(series.scaled(0.5).time_N, np.arange(10) / 2)
    assert len(series.head(3)) == 3
    with pytest.raises(UserError, match="has no arrival from"):
        series.window(20, 30)
    with pytest.raises(UserError, match="arrive at one moment"):
        ArrivalSeries("s", np.zeros(3)).at_rate(1)


def test_rescaling_a_file_applies_to_the_requests_kept(tmp_path: Path):
    (tmp_path / "a.csv").write_text("arrival\n" + "\n".join(str(t) for t in [0, 1, 2, 100, 300]) + "\n")
    assert load(tmp_path / "a.csv", num_requests=3, request_rate=10).rate == pytest.approx(10)
    assert load(tmp_path / "a.csv", window=(0, 50), time_scale=2.0).time_N.tolist() == [0, 2, 4]


def test_a_window_is_read_from_its_two_ends():
    assert parse_window("600:1200.5") == (600.0, 1200.5)
    for text in ("600", "600:", "a:b", "5:5", "-1:3", "3:inf", "nan:3"):
        with pytest.raises(UserError, match="window of arrivals"):
            parse_window(text)


@pytest.mark.parametrize("times", [[], [1.0, 0.5], [-1.0], [float("nan")]])
def test_a_series_refuses_times_that_are_none(times: list[float]):
    with pytest.raises(UserError):
        ArrivalSeries("s", np.array(times))


def test_real_traces_are_read_whole(shared_data: Path):
    azure = load(shared_data / "arrivals" / "azure-2023-conv.csv")
    assert len(azure) == 19_366
    assert azure.time_N[-1] == pytest.approx(3501.72, abs=0.01)
    assert azure.prompt_N.mean() == pytest.approx(1154.70, abs=0.01)
    assert azure.output_N.mean() == pytest.approx(211.13, abs=0.01)
    mooncake = load(shared_data / "arrivals" / "mooncake-conversation.jsonl")
    assert len(mooncake) == 12_031
    assert mooncake.time_N[-1] == pytest.approx(3537, abs=1)
