//! What a connection has to send.

/// Bytes to be sent; the front of them may have been.
#[derive(Default)]
pub(super) struct Output {
    pub(super) bytes: Vec<u8>,
    sent: usize,
}

impl Output {
    /// Room that is kept when all has been sent.
    const KEEP: usize = 256 << 10;

    pub(super) fn pending(&self) -> &[u8] {
        &self.bytes[self.sent..]
    }

    pub(super) fn take(&mut self, into: &mut Vec<u8>) {
        if self.sent == 0 {
            std::mem::swap(&mut self.bytes, into);
        } else {
            into.extend_from_slice(self.pending());
            self.written(self.pending().len());
        }
    }

    pub(super) fn written(&mut self, n: usize) {
        self.sent = (self.sent + n).min(self.bytes.len());
        if self.sent == self.bytes.len() {
            self.bytes.clear();
            self.bytes.shrink_to(Self::KEEP);
            self.sent = 0;
        } else if self.sent > self.bytes.len() / 2 {
            // Moves fewer bytes than have been sent since the last time, so each byte is moved once at most on average.
            self.bytes.drain(..self.sent);
            self.sent = 0;
        }
    }
}
