"""Which species is a contig of a strain never trained on? The accuracy of a model against the length of the contig.

    python benchmarks/species.py $LONGSEQ_DATA/genomes/enterobacteria

As many windows of each class at each length, evenly spaced over the test records, with bootstrapped intervals: what
`dna evaluate` says, recorded with machine, versions and commit.
"""

import argparse
import json
import tempfile
from pathlib import Path

from record import write_result

from seqmodels.tasks.genomics.evaluate import evaluate

LENGTHS = (1024, 4096, 8192, 16384, 65536, 262144, 524288, 1048576)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="genomes with a metadata.csv")
    parser.add_argument("--model", default="enterobacteria")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--windows", type=int, default=240, help="of each class and length, at most")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--name", default="enterobacteria", help="of the file in benchmarks/results")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        evaluate(
            given.model, data=given.data, window=list(given.lengths), windows=given.windows, output=report,
            device=given.device,
        )  # fmt: skip
        print(write_result(given.name, json.loads(report.read_text())["results"]))
