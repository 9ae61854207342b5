"""Write the table of compiled programs for the documentation."""

import pathlib
from collections.abc import Iterator

from benchmarks import steps
from benchmarks.compiled import devices, programs, reader, studies
from benchmarks.compiled.devices import Target
from benchmarks.compiled.programs import Case
from experiments.reproduction.__main__ import filled

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "performance.md"
HEAD = """\
| program | device | launches | MB moved | scratch, MB | collectives | compiled in, CPU s | floor, MB | floor, ms |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"""


def cases() -> Iterator[tuple[Target, Case]]:
    """Yield the library's programs, then a decoder on several hosts."""
    for target in (devices.h100(), devices.v5e(count=1), devices.h100(per_host=4), devices.v5e()):
        yield target, programs.selection(target)
    for target in (devices.h100(), devices.v5e(count=1)):
        for replicates in (0, 30):
            for link in ("plain", "keep_zeros", "prune"):
                yield target, programs.dense_step(target, link, replicates=replicates)
    for target in (devices.h100(), devices.v5e(count=1), devices.h100(per_host=4), devices.v5e()):
        for count in (len(target.devices), 28):
            yield target, studies.replicated_step(target, "lenet", studies.MNIST, count)
        yield target, studies.replicated_step(target, "resnet20", studies.CIFAR, len(target.devices))
    yield devices.h100(), studies.replicated_step(devices.h100(), "resnet20", studies.CIFAR, 20)
    for target in (devices.h100(), devices.v5e(count=1)):
        for network in (steps.lenet(), steps.conv(), steps.dense()):
            for coefficient in (0.0, 1e-3):
                yield target, studies.penalty_step(target, network, coefficient)
    for target in (devices.h100(hosts=2, per_host=8), devices.v5e("16x16")):
        for what in ("selection", "training step"):
            yield target, programs.decoder(target, what)


def row(target: Target, case: Case) -> str:
    """Compile a program and format its launches and bytes, with the cheapest branches."""
    program = reader.compiled(case.function, *case.arguments, donate_argnums=case.donated)
    launches, moved = program.entry.least()
    collectives = program.collectives()
    sent = sum(kernel.size for kernel in collectives)
    cells = [case.name, target.name, f"{launches}", f"{moved / 1e6:,.1f}", f"{program.scratch / 1e6:,.1f}"]
    cells += [f"{len(collectives)} ({sent / 1e6:,.2f} MB)" if collectives else "-", f"{program.busy:.1f}"]
    cells += [f"{case.floor / 1e6:,.1f}", f"{1e3 * case.floor / target.bandwidth:.3g}"]
    return "| " + " | ".join(cells) + " |"


def write() -> None:
    """Compile everything, print each row when it is compiled, and put the table into docs/performance.md."""
    lines = HEAD.splitlines()
    print(HEAD)
    for target, case in cases():
        lines.append(row(target, case))
        print(lines[-1], flush=True)
    PAGE.write_text(filled(PAGE.read_text(), {"compiled": "\n".join(lines) + "\n"}))
