"""How many dimensions of its channels a detector uses: `megdet eigenspectrum --checkpoint runs/a runs/b`."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megdet_hpc.command_line import Parser
from megdet_hpc.devices import DEVICES
from megdet_hpc.errors import UserError
from megdet_hpc.programs import as_called_here, called_as

if TYPE_CHECKING:
    from megdet_hpc.parallel.runtime import Runtime

DESCRIPTION = """Measure the covariance of the feature maps at each convolution, over a packed set.

--output gets eigenspectrum.csv (a row for each checkpoint and layer), .json with all eigenvalues, and .png, in which
two checkpoints are compared, such as pretrained against from scratch. Under a launcher the ranks share the images."""

FILES = ("eigenspectrum.csv", "eigenspectrum.json", "eigenspectrum.png")


def _parser() -> Parser:
    parser = Parser(prog=called_as("megdet_hpc.eigenspectrum"), description=as_called_here(DESCRIPTION))
    parser.add_argument(
        "--checkpoint",
        required=True,
        action="extend",
        nargs="+",
        metavar="RUN",
        help="One or two: folder of a run, whose best or newest checkpoint counts, or file.",
    )
    parser.add_argument("--data", metavar="PACK", help="Packed set; default: data.val of the first checkpoint.")
    parser.add_argument("--output", required=True, metavar="DIR", help="Folder for the results.")
    parser.add_argument("--layers", default="*", metavar="PATTERN", help="Convolutions by path, such as 'backbone.*'.")
    parser.add_argument(
        "--side",
        choices=("input", "output"),
        default="input",
        help="Feature maps that a convolution takes, after activation, or gives, before normalization.",
    )
    parser.add_argument("--images", type=int, help="First images of the set alone; default: all [images].")
    parser.add_argument(
        "--weights",
        choices=("raw", "ema"),
        help="Weights of the last update, or their moving average; default: ema where there is one.",
    )
    parser.add_argument("--device", choices=DEVICES, default="auto", help="Device of each rank.")
    parser.add_argument("--overwrite", action="store_true", help="Earlier results in --output are replaced.")
    return parser


def _prepare(options: Any) -> list[tuple[str, dict[str, Any]]]:
    """Rank 0's part before the work: the checkpoints, with the weights to use. Nothing is written yet.

    Raises:
        UserError: a checkpoint does not do, or the output folder holds results.
    """
    from megdet_hpc.engine.checkpoint import checkpoint_of, load_checkpoint, with_weights

    output = Path(options.output)
    held = [name for name in FILES if (output / name).exists()]
    if held and not options.overwrite:
        raise UserError(f"--output {output} holds {held[0]} already; name another folder, or give --overwrite")
    found: list[tuple[str, dict[str, Any]]] = []
    for run in options.checkpoint:
        path = checkpoint_of(Path(run))
        if any(path.resolve() == Path(other).resolve() for other, _ in found):
            raise UserError(f"--checkpoint {' '.join(options.checkpoint)}: both are {path}; name two different ones")
        found.append((str(path), with_weights(load_checkpoint(path), options.weights, str(path))))
    return found


def measure(options: Any, command: str, runtime: Runtime) -> None:
    """Measure, write and print. Collective of the world.

    Args:
        options: options of the command line.
        command: this rank's own command line, which must be that of all.
        runtime: world of this process.

    Raises:
        UserError: a checkpoint, the set or the output folder does not do.
    """
    from megdet_hpc.config import from_dict
    from megdet_hpc.data.categories import Categories
    from megdet_hpc.data.dataset import DetectionDataset
    from megdet_hpc.eigenspectrum.features import convolutions, measure_features
    from megdet_hpc.eigenspectrum.moments import spectra
    from megdet_hpc.engine.agreement import require_agreement
    from megdet_hpc.models.factory import restored_detector
    from megdet_hpc.parallel.serial import SerialCommunicator

    world = runtime.world
    require_agreement(world, {"the command line": command}, {})
    prepared = _prepare(options) if world.rank == 0 else None
    states = world.broadcast_object(prepared, name="checkpoints")
    device = runtime.device(options.device)
    data = options.data or from_dict(states[0][1]["config"]).data.val
    if not data:
        raise UserError("data.val of the checkpoint is null; name a packed set with --data")
    prepared_models = []
    for source, state in states:
        config = from_dict(state["config"])
        dataset = DetectionDataset.open(data, config.data, training=False, seed=0, geometry=config.model.geometry)
        require_agreement(world, {}, {"--data": dataset.pack})
        trained = Categories.of_checkpoint(state, dataset.categories)
        model = restored_detector(
            config, state["model"], source, num_categories=len(trained), group=SerialCommunicator()
        )
        convolutions(model, options.layers)
        prepared_models.append((f"{source}, step {state['step']}", model, config, dataset))
    output = Path(options.output)
    with folder_of_results(output) if world.rank == 0 else nullcontext():
        found = {}
        for name, model, config, dataset in prepared_models:
            sums = measure_features(
                model.to(device),
                config,
                dataset,
                world,
                device,
                pattern=options.layers,
                side=options.side,
                limit=options.images,
            )
            try:
                found[name] = spectra(sums)
            except UserError as error:
                raise UserError(f"{name}: {error}") from error
        if world.rank == 0:
            _finish(found, output, f"{options.side}s of convolutions, {data}", world.size)


@contextmanager
def folder_of_results(output: Path) -> Iterator[None]:
    """The folder for the results while they are measured. One that is new and stays empty is taken away again.

    Raises:
        UserError: it cannot be made.
    """
    held = output.exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be made ({error.strerror})") from error
    try:
        yield
    except BaseException:
        if not held:
            with suppress(OSError):  # it holds a file by now
                output.rmdir()
        raise


def _few_positions(found: dict[str, Any]) -> list[str]:
    """A warning for each checkpoint with layers whose dimension is bounded by the number of positions they saw."""
    lines = []
    for name, spectra in found.items():
        few = [one for one in spectra if one.positions <= one.channels]
        if few:
            least = min(few, key=lambda one: one.positions / one.channels)
            lines.append(
                f"warning: {name}: {len(few)} of {len(spectra)} layers saw no more positions than they have channels, "
                f"such as {least.layer} with {least.positions} of {least.channels}; their dimensions are below that "
                "number whatever the network does; more or larger images tell more"
            )
    return lines


def _finish(found: dict[str, Any], output: Path, title: str, ranks: int) -> None:
    """Write the three files and print a line for each checkpoint.

    Raises:
        UserError: the folder takes no files.
    """
    from dataclasses import asdict

    from megdet_hpc.eigenspectrum.moments import SHARES
    from megdet_hpc.files import atomic_write, csv_text, write_json
    from megdet_hpc.report.drawing import can_draw

    rows = []
    for name, spectra in found.items():
        for one in spectra:
            row = {"checkpoint": name, **asdict(one)}
            del row["eigenvalues"]
            row |= {f"components_{share}": n for share, n in zip(SHARES, row.pop("components"), strict=True)}
            rows.append(row)
    try:
        with atomic_write(output / FILES[0]) as file:
            file.write(csv_text(rows).encode())
        write_json(output / FILES[1], {name: [asdict(one) for one in own] for name, own in found.items()})
        if can_draw():
            from megdet_hpc.eigenspectrum.figure import draw_spectra

            draw_spectra(found, output / FILES[2], title)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror})") from error
    for name, own in found.items():
        dead, channels = sum(one.dead for one in own), sum(one.channels for one in own)
        mean = sum(one.participation_ratio / one.channels for one in own) / len(own)
        print(
            f"{name}, {ranks} rank(s): {len(own)} layers, participation ratio {100 * mean:.1f} % of the channels (mean "
            f"of layers), {dead} of {channels} channels dead"
        )
    for line in _few_positions(found):
        print(line, file=sys.stderr, flush=True)
    written = [str(output / name) for name in FILES if (output / name).exists()]
    print(f"result: {len(rows)} rows in {', '.join(written)}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    options = parser.parse_args(arguments)
    if len(options.checkpoint) > 2 or len(set(map(os.path.realpath, options.checkpoint))) < len(options.checkpoint):
        parser.error(f"--checkpoint {' '.join(options.checkpoint)}; accepted: one, or two different ones")
    if options.images is not None and options.images < 1:
        parser.error(f"--images is {options.images}; accepted: 1 or more")
    # imported late: torch takes seconds to load, which --help and a wrong option need not wait for
    from megdet_hpc.parallel.start import started

    with started(device=options.device) as runtime:
        measure(options, shlex.join(arguments), runtime)


if __name__ == "__main__":
    main()
