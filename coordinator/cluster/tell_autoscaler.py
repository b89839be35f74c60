"""`python -m coordinator.cluster.tell_autoscaler HOST:PORT`: hand what is on stdin to Ray's autoscaler, by its GCS.

A process of its own: Ray's client for its GCS waits 40 seconds where nobody answers, whatever one asks of it, and one cannot give
it up.
"""

from __future__ import annotations

import json
import sys


def main() -> int:
    """Pass the list of resources and labels on; the exit status."""
    from ray.autoscaler.v2.sdk import request_cluster_resources

    try:
        request_cluster_resources(sys.argv[1], json.load(sys.stdin))
    except Exception as error:
        print(str(error) or type(error).__name__, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
