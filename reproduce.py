"""The paper's tables 2 and 3 and figures 3, 4 and 8: python reproduce.py CONFIG.yaml [--field value ...]

CONFIG.yaml and the fields are those of train.py; interrupted, the same command goes on with the runs that are missing.
"""

import signal
import sys

from magneto_training.arguments import (
    DataArguments,
    MagnetoTrainingArguments,
    ModelArguments,
    ReproductionArguments,
    parse_arguments,
    user_errors_in_one_line,
)
from magneto_training.reproduction import Reproduction, format_results

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def end(number: int, _) -> None:
    """Leave by an exception, which ends the runs; another signal would get in the way of that."""
    for other in SIGNALS:
        signal.signal(other, lambda *_: None)
    sys.exit(128 + number)


def main() -> None:
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup does
            signal.signal(number, end)
    args, model_args, data_args, training_args = parse_arguments(
        (ReproductionArguments, ModelArguments, DataArguments, MagnetoTrainingArguments)
    )
    reproduction = Reproduction(args, model_args, data_args, training_args)
    reproduction.make_runs()
    print(format_results(reproduction.write_results()))
    print(reproduction.output_dir / "results.md")


if __name__ == "__main__":
    with user_errors_in_one_line("reproduce.py"):
        main()
