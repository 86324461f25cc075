//! Mutations that know what a frame is: most of what they make passes the first check, and breaks something behind it.

use rig::Random;

/// A frame, well-formed or not.
#[derive(Clone)]
pub(crate) struct Packet {
    pub(crate) kind: u8,
    pub(crate) channel: u16,
    pub(crate) payload: Vec<u8>,
    /// What the head says of the payload's length, if that is not the truth.
    size: Option<u32>,
    end: u8,
}

impl Packet {
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let size = self.size.unwrap_or(self.payload.len() as u32);
        let mut bytes = vec![self.kind];
        bytes.extend_from_slice(&self.channel.to_be_bytes());
        bytes.extend_from_slice(&size.to_be_bytes());
        bytes.extend_from_slice(&self.payload);
        bytes.push(self.end);
        bytes
    }
}

/// The packets of a well-formed stream.
pub(crate) fn packets(mut bytes: &[u8]) -> Vec<Packet> {
    let mut packets = Vec::new();
    while let [kind, c1, c0, s3, s2, s1, s0, rest @ ..] = bytes {
        let size = u32::from_be_bytes([*s3, *s2, *s1, *s0]) as usize;
        packets.push(Packet {
            kind: *kind,
            channel: u16::from_be_bytes([*c1, *c0]),
            payload: rest[..size].to_vec(),
            size: None,
            end: rest[size],
        });
        bytes = &rest[size + 1..];
    }
    assert!(bytes.is_empty(), "a recording ends with a frame");
    packets
}

pub(crate) fn join(packets: &[Packet]) -> Vec<u8> {
    packets.iter().flat_map(Packet::to_bytes).collect()
}

/// Numbers at which something ends.
const EDGES: [u32; 12] = [
    0,
    1,
    127,
    128,
    255,
    256,
    4_088,
    4_089,
    131_064,
    131_065,
    0x7fff_ffff,
    u32::MAX,
];

/// Changes one to four things.
pub(crate) fn mutate(packets: &mut Vec<Packet>, pool: &[Packet], random: &mut Random) {
    for _ in 0..=random.below(4) {
        let at = random.below(packets.len().max(1));
        match random.below(8) {
            // The order of frames.
            0 if at + 1 < packets.len() => packets.swap(at, at + 1),
            1 if packets.len() > 1 => drop(packets.remove(at)),
            2 => {
                let again = random.pick(pool).clone();
                packets.insert(at, again);
            }
            3 => packets.insert(at, nested(random)),
            _ => match packets.get_mut(at) {
                Some(packet) => damage(packet, random),
                None => packets.push(random.pick(pool).clone()),
            },
        }
    }
}

fn damage(packet: &mut Packet, random: &mut Random) {
    let payload = &mut packet.payload;
    let len = payload.len();
    match random.below(12) {
        0 => packet.kind = *random.pick(&[0, 1, 2, 3, 4, 8, 255]),
        1 => packet.channel = *random.pick(&[0, 1, 2, 3, 2_047, 2_048, u16::MAX]),
        2 => packet.size = Some(*random.pick(&EDGES)),
        3 => packet.end = random.next() as u8,
        4 => payload.truncate(random.below(len + 1)),
        5 => payload.extend((0..random.below(40)).map(|_| random.next() as u8)),
        6 if len >= 4 => {
            // Another method of the same class, or of another.
            let methods = [
                10, 11, 20, 21, 30, 31, 40, 41, 50, 51, 60, 70, 71, 72, 80, 90, 120,
            ];
            payload[3] = *random.pick(&methods);
            if random.below(2) == 0 {
                payload[1] = *random.pick(&[10, 20, 30, 40, 50, 60, 70, 85, 90]);
            }
        }
        7 if len >= 4 => {
            let at = random.below(len - 3);
            payload[at..at + 4].copy_from_slice(&random.pick(&EDGES).to_be_bytes());
        }
        8 if len >= 14 => {
            // Property flags, or what stands there in a method.
            payload[12] = random.next() as u8;
            payload[13] = random.next() as u8;
        }
        9 if len > 0 => {
            let at = random.below(len);
            let kinds = b"tbBUuIislLdfDSATFVx";
            payload[at] = *random.pick(kinds);
        }
        _ if len > 0 => {
            let at = random.below(len);
            payload[at] ^= 1 << random.below(8);
        }
        _ => payload.push(random.next() as u8),
    }
}

/// `queue.declare` whose arguments are tables and arrays in each other, up to far more than anybody may nest.
fn nested(random: &mut Random) -> Packet {
    let depth = *random.pick(&[1, 8, 63, 64, 65, 200, 5_000]);
    let mut value = vec![b'V'];
    for _ in 0..depth {
        let mut outer;
        if random.below(2) == 0 {
            outer = vec![b'A'];
            outer.extend_from_slice(&(value.len() as u32).to_be_bytes());
        } else {
            outer = vec![b'F'];
            outer.extend_from_slice(&(value.len() as u32 + 2).to_be_bytes());
            outer.extend_from_slice(b"\x01k");
        }
        outer.append(&mut value);
        value = outer;
    }
    // Class, method, ticket, the queue's name, flags.
    let mut payload = vec![0, 50, 0, 10, 0, 0, 1, b'n', 0];
    payload.extend_from_slice(&(value.len() as u32 + 2).to_be_bytes());
    payload.extend_from_slice(b"\x01k");
    payload.append(&mut value);
    Packet {
        kind: 1,
        channel: 1,
        payload,
        size: None,
        end: 0xCE,
    }
}
