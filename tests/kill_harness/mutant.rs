//! A publisher with a planted fault, which the harness must find: it claims a slot with the final word and writes the
//! payload afterwards, straight into the mapping of the log.

use std::fs;

use shmbus::{Bus, Mode, Publisher};

use crate::checker::{Messages, Readers, message};
use crate::scenarios::{Grain, Scenario, topic};
use crate::tracer::between_markers;

pub(crate) const NAME: &str = "mutant: claims first, writes later";

/// Where a log's ring starts: a page of header, then the log's own (ARCHITECTURE.md §3).
const RING_OFFSET: usize = 4096 + 20_480;

/// Where the header says how long the ring is.
const SLOTS_OFFSET: usize = 48;

const SLOT_BYTES: usize = 64;
const INLINE: u64 = 1 << 6;
const LEN: usize = 48;

fn published(life: u64) -> Messages {
    (vec![message(life, 0, LEN)], vec![message(life, 1, LEN)])
}

pub(crate) fn scenario() -> Scenario {
    Scenario {
        name: NAME,
        stride: 128,
        grain: Grain::Fault,
        victim,
        survivors: |bus| Ok(Box::new(Readers::new(bus, topic(Mode::Exclusive), false, published)?)),
    }
}

fn victim(bus: &Bus, life: u64) {
    let mut publisher: Publisher<[u8]> = bus.publisher(topic(Mode::Exclusive)).unwrap();
    let (before, operation) = published(life);
    let last = publisher.publish(&before[0]).unwrap().get();
    let (next, word) = slot_ahead(last, 1, LEN);
    between_markers(|| write(next, word, &operation[0]))
}

/// Publishes so far ahead of the last message of the process's only publisher, on an exclusive topic.
pub(crate) fn write_ahead(last: u64, ahead: u64, payload: &[u8]) {
    let (slot, word) = slot_ahead(last, ahead, payload.len());
    write(slot, word, payload);
}

/// A slot behind the last message, and the word that commits it.
fn slot_ahead(last: u64, ahead: u64, len: usize) -> (*mut u8, u64) {
    let log = mapping_of(":log (deleted)") as *mut u8;
    // SAFETY: the header lies at the start of the mapping, which lives as long as the publisher.
    let slots = unsafe { log.add(SLOTS_OFFSET).cast::<u64>().read_volatile() };
    let slot = |position: u64| {
        // SAFETY: the slot lies in the ring, which the header measures.
        unsafe { log.add(RING_OFFSET + (position % slots) as usize * SLOT_BYTES) }
    };
    // SAFETY: the slot's first word, aligned; the tenancy in it is this publisher's.
    let tenancy = unsafe { slot(last).cast::<u64>().read_volatile() } & 0xff00;
    (slot(last + ahead), (last + ahead) << 16 | tenancy | INLINE | len as u64)
}

#[inline(always)]
fn write(slot: *mut u8, word: u64, payload: &[u8]) {
    // SAFETY: the slot is one of the ring above the tail of the only publisher; the readers below it expect nothing of it yet.
    unsafe {
        slot.cast::<u64>().write_volatile(word);
        for (at, byte) in payload.iter().enumerate() {
            slot.add(8 + at).write_volatile(*byte);
        }
    }
}

/// The start of the segment whose name has this part.
pub(crate) fn mapping_of(part: &str) -> usize {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let line = maps.lines().find(|line| line.contains("/memfd:shmbus:") && line.contains(part));
    let line = line.unwrap_or_else(|| panic!("no segment {part} is mapped:\n{maps}"));
    usize::from_str_radix(line.split_once('-').unwrap().0, 16).unwrap()
}
