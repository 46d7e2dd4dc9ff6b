"""Print each room's branch coverage from `coverage json`; exit 1 if one of those named is below the floor.

Usage: python tools/branch_coverage.py coverage.json 95 envs algorithms theory
"""

import json
import sys
from collections import Counter

path, floor, *rooms = sys.argv[1:]
taken, total = Counter(), Counter()
with open(path) as report:
    for name, file in json.load(report)["files"].items():
        room = name.split("/")[0]
        taken[room] += file["summary"]["covered_branches"]
        total[room] += file["summary"]["num_branches"]
low = []
for room in sorted(total):
    share = 100 * taken[room] / max(total[room], 1)
    print(f"branches taken in {room + '/':<13} {taken[room]:5d} of {total[room]:5d}   {share:5.1f} %")
    if room in rooms and share < float(floor):
        low.append(room)
missing = [room for room in rooms if room not in total]
if low or missing:
    sys.exit(f"below {floor} %: {', '.join(low) or 'none'}; not measured: {', '.join(missing) or 'none'}")
