"""`make bench`: every benchmark, one after the other."""

from __future__ import annotations

from benchmarks import fanout, packing, restart, schedule, simulate, submit, submits

if __name__ == "__main__":
    submit.main()
    submits.main()
    fanout.main()
    restart.main()
    schedule.main()
    simulate.main()
    packing.main()
