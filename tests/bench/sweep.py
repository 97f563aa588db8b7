"""A sweep of AG News with MiniLM, ten sites: 5 ε, 3 learning rates, 3 seeds, 30 rounds each.

Reads and writes where real.py does. A plain run makes the features first, so that the time is the
sweep's own.
"""

import time

from tests.bench.real import news, prepare, simulated


def main() -> None:
    """Run the sweep through the command line, print its best points and its seconds."""
    prepare()
    study = news()
    study["training"]["rounds"] = 30
    simulated(study)
    study["name"] = "ag-news-sweep"
    study["simulation"]["grid"] = {
        "epsilon": [0.5, 1.0, 2.0, 4.0, 8.0],
        "learning_rate": [0.5, 1.0, 2.0],
        "seeds": [0, 1, 2],
    }
    began = time.perf_counter()
    report = simulated(study, "--grid")
    seconds = time.perf_counter() - began
    for best in report["best"]:
        print(
            f"ε {best['epsilon']:<4g} rate {best['learning_rate']:<4g} accuracy "
            f"{best['accuracy']:.4f} ± {best['accuracy_deviation']:.4f}"
        )
    trials = sum(point["trials"] for point in report["points"])
    print(f"{trials} runs in {report['timing']['points']:.1f} s; the command {seconds:.1f} s")


if __name__ == "__main__":
    main()
