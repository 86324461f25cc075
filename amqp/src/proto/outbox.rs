//! What a connection has to send, and in which order.
//!
//! Nearly everything is appended to one buffer and leaves in the order it was said. A body that does not fit one frame is
//! the exception: an upload of minutes must not hold up the acks, requests and heartbeats of everybody else. Its channel
//! gets a *lane* of its own, in which the message waits as a whole and everything that is said on the channel afterwards waits
//! behind it, since nothing may come between the frames of a message on its channel. Each time the socket takes bytes, what is in the
//! common buffer goes first, then some frames from the lanes, which take turns frame by frame.
//!
//! What must stay true: what is taken ends at a frame boundary, the frames of one channel are in the order they were said
//! in, and however small the pieces that the socket takes, the bytes are the same.

use std::collections::VecDeque;
use std::rc::Rc;

use super::connection::Connection;
use crate::error::EncodeError;
use crate::wire::Publish;
use crate::wire::frame::put_body;

/// From the lanes, enough for one write; at least one frame is taken, and at most one more than this.
const BULK: usize = 64 << 10;

/// Bytes to be sent.
#[derive(Default)]
pub(super) struct Outbox {
    /// What leaves next, in this order.
    bytes: Vec<u8>,
    /// Channels in the middle of a large message; the first has the next turn.
    lanes: VecDeque<Lane>,
}

struct Lane {
    channel: u16,
    /// Never empty.
    queue: VecDeque<Piece>,
}

enum Piece {
    /// Whole methods and messages.
    Frames(Vec<u8>),
    /// A message: its method and header, which go with its first body frame, and how much of the body has gone.
    Large {
        head: Vec<u8>,
        body: Rc<[u8]>,
        at: usize,
    },
}

impl Outbox {
    /// Where frames of a channel are appended.
    #[inline]
    pub(super) fn lane(&mut self, channel: u16) -> &mut Vec<u8> {
        if self.lanes.is_empty() {
            return &mut self.bytes;
        }
        self.behind_large(channel)
    }

    fn behind_large(&mut self, channel: u16) -> &mut Vec<u8> {
        let Some(lane) = self.lanes.iter_mut().find(|l| l.channel == channel) else {
            return &mut self.bytes;
        };
        // A piece leaves as a whole, so it is not to grow much larger than a turn.
        if !matches!(lane.queue.back(), Some(Piece::Frames(frames)) if frames.len() < BULK) {
            lane.queue.push_back(Piece::Frames(Vec::new()));
        }
        match lane.queue.back_mut() {
            Some(Piece::Frames(frames)) => frames,
            Some(Piece::Large { .. }) | None => unreachable!("one has just been seen to"),
        }
    }

    /// Appends a message whose body needs several frames.
    pub(super) fn put_large(
        &mut self,
        channel: u16,
        publish: &Publish<'_>,
        props: &[u8],
        body: Rc<[u8]>,
        max_payload: usize,
    ) -> Result<(), EncodeError> {
        let mut head = Vec::new();
        publish.put_head(&mut head, channel, props, body.len(), max_payload)?;
        let piece = Piece::Large { head, body, at: 0 };
        match self.lanes.iter_mut().find(|l| l.channel == channel) {
            Some(lane) => lane.queue.push_back(piece),
            None => self.lanes.push_back(Lane {
                channel,
                queue: [piece].into(),
            }),
        }
        Ok(())
    }

    /// How many bytes there are, but for the frames round the pieces of large bodies.
    #[inline]
    pub(super) fn len(&self) -> usize {
        let lanes = self.lanes.iter().flat_map(|l| &l.queue);
        let lanes: usize = lanes.map(Piece::len).sum();
        self.bytes.len() + lanes
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty() && self.lanes.is_empty()
    }

    /// Moves what goes next into an empty buffer.
    pub(super) fn take(&mut self, into: &mut Vec<u8>, max_payload: usize) {
        std::mem::swap(&mut self.bytes, into);
        let enough = into.len() + BULK;
        while into.len() < enough
            && let Some(mut lane) = self.lanes.pop_front()
        {
            match lane.queue.front_mut() {
                Some(Piece::Frames(frames)) => {
                    into.append(frames);
                    lane.queue.pop_front();
                }
                Some(Piece::Large { head, body, at }) => {
                    into.append(head);
                    let piece = &body[*at..body.len().min(*at + max_payload)];
                    put_body(into, lane.channel, piece);
                    *at += piece.len();
                    if *at == body.len() {
                        lane.queue.pop_front();
                    }
                }
                None => {}
            }
            if !lane.queue.is_empty() {
                self.lanes.push_back(lane);
            }
        }
    }

    /// The peer has closed a channel: what has not begun to leave stays here. A message that has begun goes on to its end,
    /// since a peer takes a method in the middle of it for a violation.
    pub(super) fn forget_channel(&mut self, channel: u16) {
        self.lanes.retain_mut(|lane| {
            if lane.channel == channel {
                let begun = |piece: &Piece| matches!(piece, Piece::Large { at: 1.., .. });
                let keep = usize::from(lane.queue.front().is_some_and(begun));
                lane.queue.truncate(keep);
            }
            !lane.queue.is_empty()
        });
    }

    /// The connection ends: only what is in the common buffer still goes.
    pub(super) fn forget_lanes(&mut self) {
        self.lanes.clear();
    }
}

impl Piece {
    fn len(&self) -> usize {
        match self {
            Self::Frames(frames) => frames.len(),
            Self::Large { head, body, at } => head.len() + body.len() - at,
        }
    }
}

/// Bytes on their way into a socket, which takes them in pieces of any size; the protocol appends to a buffer of its own meanwhile.
#[derive(Debug, Default)]
pub struct Sending {
    bytes: Vec<u8>,
    sent: usize,
}

impl Sending {
    /// Room that is kept when all has been sent.
    const KEEP: usize = 1 << 20;

    /// What the socket is to be given.
    pub fn rest(&self) -> &[u8] {
        &self.bytes[self.sent..]
    }

    /// Takes what there is to be sent, if the last is gone.
    pub fn fill(&mut self, connection: &mut Connection) {
        if self.rest().is_empty() {
            self.bytes.clear();
            self.bytes.shrink_to(Self::KEEP);
            self.sent = 0;
            connection.flush_acks();
            connection.take_output(&mut self.bytes);
        }
    }

    /// The socket has taken `n` bytes.
    pub fn advance(&mut self, n: usize) {
        self.sent = (self.sent + n).min(self.bytes.len());
    }
}
