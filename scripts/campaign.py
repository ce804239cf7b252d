"""Random models, directions and settings against the formulas: `python scripts/campaign.py --cases 10000`

Random cases of `tests/campaign.py`, each against the steps in float64. A failure prints the line that runs this one case again.

The last result, of `--cases 10000`:

      5547 guided
      3443 plain
       512 guided, with a token at the threshold
       460 guided in part, by sigma
        38 guided in part, by sigma, with a token at the threshold
    largest relative error: 3.0e-15 in torch.float64, 2.7e-06 in torch.float32, 8.8e-04 in torch.float16, 8.5e-03 in torch.bfloat16
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import click
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests import campaign


def outcomes(seed: int, numbers: range) -> Iterator[tuple[campaign.Case, campaign.Outcome]]:
    for number in tqdm(numbers, unit=" cases", disable=len(numbers) == 1):
        outcome = campaign.run(seed, number)
        if outcome.kind == campaign.FAILED:
            tqdm.write(outcome.message)
        yield campaign.case(seed, number), outcome


@click.command(help=(__doc__ or "").partition("The last result")[0])
@click.option("--cases", type=click.IntRange(1), default=1000, show_default=True, help="How many cases to run.")
@click.option("--seed", default=0, show_default=True, help="Another seed has other cases.")
@click.option("--case", "one", type=click.IntRange(0), help="Only the case of this number.")
def main(cases: int, seed: int, one: int | None) -> None:
    if one is not None:
        click.echo(campaign.case(seed, one))
    result = list(outcomes(seed, range(cases) if one is None else range(one, one + 1)))
    click.echo(campaign.report(result))
    sys.exit(any(outcome.kind == campaign.FAILED for _, outcome in result))


if __name__ == "__main__":
    main()
