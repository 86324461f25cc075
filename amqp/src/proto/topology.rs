//! What a connection relies on, to be made again after it was lost.
