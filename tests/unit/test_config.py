from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from megdet_hpc.command_line import config_parser, named_configs, parse_config
from megdet_hpc.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    FasterRcnnConfig,
    NormConfig,
    SolverConfig,
    completed,
    flatten,
    to_dict,
)
from megdet_hpc.engine.first_lines import to_plain
from megdet_hpc.errors import UserError


def parse(*arguments: str) -> Config:
    return parse_config(config_parser("megdet_hpc.train", "test"), list(arguments))[0]


def test_a_configuration_overrides_a_key_that_stands_before_it(tmp_path: Path) -> None:
    """The job scripts give MEGDET_DATA's packs before the user's file, which may name its own."""
    file = tmp_path / "mine.yaml"
    file.write_text("data: {train: mine/train}\n")
    config = parse("--data.train", "site/train", "--data.val", "site/val", "--config", str(file))
    assert (config.data.train, config.data.val) == ("mine/train", "site/val")


@pytest.mark.parametrize("name", [name for name in named_configs() if not name.startswith("study")])
def test_named_configs_parse(name: str) -> None:
    assert {"tiny", "tiny_mask", "megdet_r50_fpn_16", "megdet_r50_fpn_256"} <= set(named_configs())
    assert isinstance(parse("--config", name), Config)


def test_the_papers_config() -> None:
    config = parse("--config=megdet_r50_fpn_256")
    assert (config.data.images_per_rank, config.data.short_sides, config.data.max_side) == (2, (800,), 1333)
    assert (config.model.backbone, config.norm.kind, config.norm.size) == ("resnet50", "cgbn", 32)


def test_overrides_are_typed_and_later_ones_win(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("norm: {size: 8}\nsolver: {base_lr: 0.5}\n")
    config = parse("--config", "tiny", "--config", str(file), "--norm.size", "4", "--data.val", "null")
    assert (config.norm.size, config.solver.base_lr, config.data.val) == (4, 0.5, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--norm.sise", "3"], "Did you mean --norm.size?"),
        (["--model.weights", ""], "--model.weights is empty, as of a variable of the shell that is not set;"),
        (["--data.val=", "--norm.size", "4"], "--data.val is empty"),
        (["--config", ""], "--config : no such file"),
        (["--config", "tinny"], "did you mean tiny?"),
        (["--watchdog_minutes", "abc"], "error: watchdog_minutes is 'abc'; accepted: a number, auto\n"),
        (["--max_minutes", "soon"], "error: max_minutes is 'soon'; accepted: a number, null\n"),
        (["--watchdog_minutes", "-1"], "watchdog_minutes is -1.0; accepted: 0 or more"),
        (["--solver.drop_epochs", "3"], "solver.drop_epochs is '3'; accepted: a list, such as [3]"),
        (["--norm.size", "all"], "norm.size is 'all'; accepted: a whole number"),
        (["--norm.kind", "batch"], "error: norm.kind is 'batch'; accepted: cgbn, bn, frozen, gn\n"),
        (["--device", "gpu"], "device is 'gpu'; accepted: auto, cpu, cuda, xpu, cuda_shared\n"),
        (["--log.trackers", "[tensorbord]"], "log.trackers is 'tensorbord'; accepted: tensorboard, mlflow, wandb\n"),
        (["--config", "tiny", "--model.detector", "retinanet"], "\nmodel.box_head_channels is a key of faster_rcnn, "),
        (["--config", "tiny_retinanet", "--model.sampler", "ohem"], ", and model.detector is retinanet. Each family"),
        (["--solver.base_lr", "fast"], "solver.base_lr"),
        (["--data.images_per_rank", "0"], "data.images_per_rank is 0; accepted: 1 or more"),
        (["--checkpoints.keep", "1"], "checkpoints.keep is 1; accepted: 2 or more"),
        (["--solver.drop_epochs", "[3]"], "one factor for each of solver.drop_epochs"),
    ],
)
def test_bad_command_lines_name_the_key(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(*arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no keys; accepted: keys with values, such as solver: {epochs: 12}"),
        ("# all of it is commented out\n", "holds no keys"),
        ("[1, 2]", "holds [1, 2]; accepted: keys with values"),
        ("solver: [1, 2]", "solver holds [1, 2]; accepted: keys with values\n"),
        ("evaluation:", "evaluation holds nothing; accepted: keys with values\n"),
        ("solver: {epochs: 3", "is no YAML"),
    ],
)
def test_a_file_of_another_form_is_named(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit) as ended:
        parse("--config", str(file))
    said = capsys.readouterr().err
    assert ended.value.code == 2 and f"--config {file}: " in said and message in said


def test_an_unknown_key_in_a_file_suggests_the_near_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("norm: {sizes: 8}\n")
    with pytest.raises(SystemExit):
        parse("--config", str(file))
    assert "Did you mean --norm.size?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Config(model=FasterRcnnConfig(anchor_sizes=(32,))), "5 size"),
        (lambda: Config(data=DataConfig(short_sides=(900,), max_side=800)), "from 1 to data.max_side = 800"),
        (lambda: Config(solver=SolverConfig(drop_epochs=(10, 8))), "rising order"),
        (lambda: Config(solver=SolverConfig(clip_norm=0.0)), "more than 0"),
    ],
)
def test_values_are_checked_against_each_other(build: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build()  # type: ignore[operator]


def test_a_stored_configuration_of_an_older_version_has_the_defaults_of_new_keys() -> None:
    stored = to_dict(Config(seed=3, norm=NormConfig(size=8)))
    older = {**stored, "norm": {"size": 8}, "model": {"backbone": "resnet18"}}
    del older["log_every"]
    assert completed(stored) == stored
    found = completed(older)
    assert (found["seed"], found["norm"]["size"], found["norm"]["kind"], found["log_every"]) == (3, 8, "cgbn", 20)
    assert found["model"]["backbone"] == "resnet18" and found["model"]["fixed_from_scratch"] is False


def test_help_explains_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    for group in dataclasses.fields(Config):
        names = [group.name]
        if dataclasses.is_dataclass(group.default_factory):
            names = [f"{group.name}.{f.name}" for f in dataclasses.fields(group.default_factory)]  # type: ignore[arg-type]
        for name in names:
            assert f"--{name} " in text, name
    assert "[pixels]" in text and "[epochs]" in text


OLD = Path(__file__).resolve().parents[1] / "files" / "config_of_0.1.0.yaml"


def test_a_run_of_the_first_version_is_read_as_what_it_was() -> None:
    old = yaml.safe_load(OLD.read_text())
    config = parse("--config", str(OLD))
    assert isinstance(config.model, FasterRcnnConfig)
    stored, ours = flatten(old), flatten(to_plain(config))
    assert {key: ours[key] for key in stored} == stored
    # as evaluate and resume read a checkpoint's
    assert flatten(completed(old)).items() >= stored.items()


def test_a_family_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--config", "tiny", "--model.detector", "faster_rcn")
    assert "model.detector is 'faster_rcn'; accepted: faster_rcnn, mask_rcnn, cascade_rcnn" in capsys.readouterr().err


def test_targets_need_the_training_to_score() -> None:
    """Deferred scores come after the time that the training would note."""
    with pytest.raises(UserError, match=r"evaluation\.targets is \(0\.5,\); accepted: \[\] with mode deferred"):
        Config(evaluation=EvaluationConfig(targets=(0.5,), mode="deferred"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("resume: null", "resume is null"),
        ("data: {train: null}", "data.train is"),
        ("data: {val: ''}", "data.val is empty; accepted: str | None"),
        ("model: {weights: ''}", "model.weights is empty; accepted: str | None"),
        ("output: ''", "output is empty; accepted: str"),
    ],
)
def test_null_and_empty_texts_are_refused_where_the_type_has_none(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line takes null for a text, and no empty one."""
    (tmp_path / "c.yaml").write_text(f"{text}\n")
    with pytest.raises(SystemExit) as ended:
        parse_config(config_parser("train", ""), ["--config", "tiny", "--config", str(tmp_path / "c.yaml")])
    assert ended.value.code == 2 and said in capsys.readouterr().err
