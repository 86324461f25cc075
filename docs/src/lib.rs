//! The chapters, as doctests.
