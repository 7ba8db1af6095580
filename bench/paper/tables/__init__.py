"""The evaluation tables, a file each; ``python -m bench.paper NAME`` makes one."""
