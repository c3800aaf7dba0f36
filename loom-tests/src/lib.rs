//! Models of the rings; they live in `tests/`.
