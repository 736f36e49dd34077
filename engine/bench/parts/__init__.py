"""What benchmarks share: published shapes, floors, random engines, workloads, tables. No benchmark itself."""
