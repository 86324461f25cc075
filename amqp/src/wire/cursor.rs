//! A reading position in borrowed bytes; `None` means that the bytes end too early.

#[derive(Clone, Copy)]
pub(super) struct Cursor<'a>(pub(super) &'a [u8]);

/// Why a short string could not be read.
pub(super) enum Fault {
    Truncated,
    Utf8,
}

impl<'a> Cursor<'a> {
    #[inline]
    fn chunk<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }

    #[inline]
    pub(super) fn u8(&mut self) -> Option<u8> {
        self.chunk::<1>().map(|[b]| b)
    }

    #[inline]
    pub(super) fn u16(&mut self) -> Option<u16> {
        self.chunk().map(u16::from_be_bytes)
    }

    #[inline]
    pub(super) fn u32(&mut self) -> Option<u32> {
        self.chunk().map(u32::from_be_bytes)
    }

    #[inline]
    pub(super) fn u64(&mut self) -> Option<u64> {
        self.chunk().map(u64::from_be_bytes)
    }

    #[inline]
    pub(super) fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(head)
    }

    /// The bytes of a short string.
    #[inline]
    pub(super) fn short(&mut self) -> Option<&'a [u8]> {
        let n = self.u8()?;
        self.take(n.into())
    }

    /// The bytes of a long string, a table or an array.
    #[inline]
    pub(super) fn long(&mut self) -> Option<&'a [u8]> {
        let n = self.u32()?;
        self.take(n as usize)
    }

    #[inline]
    pub(super) fn short_str(&mut self) -> Result<&'a str, Fault> {
        let bytes = self.short().ok_or(Fault::Truncated)?;
        std::str::from_utf8(bytes).map_err(|_| Fault::Utf8)
    }
}
