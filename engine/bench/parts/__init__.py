"""What benchmarks share: published shapes, measured limits, floors, random engines, workloads, tables. No benchmark itself."""
