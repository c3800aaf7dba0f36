//! What a measured message is: a few words, or bytes that are copied in and read in full.

use std::hint::black_box;

use shmbus::{Payload, PublishError, Publisher};

use super::args::{Setup, Task, Workload};

/// How numbered messages go out and come in.
pub(super) trait Wire {
    type Payload: Payload + ?Sized;

    /// Publishes the message with this number.
    fn send(&mut self, to: &mut Publisher<Self::Payload>, number: u64) -> Result<(), PublishError>;

    /// Publishes `count` messages from this number on, in one batch.
    fn send_batch(&mut self, to: &mut Publisher<Self::Payload>, first: u64, count: usize) -> Result<(), PublishError>;

    /// The message's number; `None` if its parts do not belong together.
    fn read(&mut self, payload: &Self::Payload) -> Option<u64>;
}

/// `N` words, the number in each: 1 is the 8 B message, 7 fill a cache line together with the bus's own word.
pub(super) struct Words<const N: usize> {
    batch: Vec<[u64; N]>,
}

impl<const N: usize> Words<N> {
    pub(super) fn new(setup: &Setup) -> Self {
        Words { batch: vec![[0; N]; setup.batch as usize] }
    }
}

impl<const N: usize> Wire for Words<N> {
    type Payload = [u64; N];

    #[inline]
    fn send(&mut self, to: &mut Publisher<[u64; N]>, number: u64) -> Result<(), PublishError> {
        to.publish(&[number; N]).map(drop)
    }

    #[inline]
    fn send_batch(&mut self, to: &mut Publisher<[u64; N]>, first: u64, count: usize) -> Result<(), PublishError> {
        for (number, message) in (first..).zip(&mut self.batch[..count]) {
            *message = [number; N];
        }
        to.publish_batch(&self.batch[..count]).map(drop)
    }

    #[inline]
    fn read(&mut self, payload: &[u64; N]) -> Option<u64> {
        let number = payload[0];
        (payload[N - 1] == number).then_some(number)
    }
}

/// Messages from this size on are written in place, in the publisher's own memory.
const LOAN_BYTES: usize = 1024;

/// Any number of bytes, the number in the first eight. Round trips, wakes and queues touch only those (zero copy); what is
/// a stream copies every byte in and reads every byte.
pub(super) struct Bytes {
    whole: bool,
    /// One message's bytes a batch place.
    batch: Vec<Vec<u8>>,
}

impl Bytes {
    pub(super) fn new(task: &Task) -> Bytes {
        let message = vec![0x5a; task.setup.size as usize];
        let whole = matches!(task.workload, Workload::Stream | Workload::Fanout | Workload::Fanin);
        Bytes { whole, batch: vec![message; task.setup.batch as usize] }
    }
}

impl Wire for Bytes {
    type Payload = [u8];

    #[inline]
    fn send(&mut self, to: &mut Publisher<[u8]>, number: u64) -> Result<(), PublishError> {
        let message = &mut self.batch[0];
        message[..8].copy_from_slice(&number.to_le_bytes());
        if message.len() < LOAN_BYTES {
            return to.publish(message).map(drop);
        }
        let mut loan = to.loan_bytes(message.len())?;
        let written = if self.whole { message.len() } else { 8 };
        loan[..written].copy_from_slice(&message[..written]);
        loan.publish().map(drop)
    }

    fn send_batch(&mut self, to: &mut Publisher<[u8]>, first: u64, count: usize) -> Result<(), PublishError> {
        for (number, message) in (first..).zip(&mut self.batch[..count]) {
            message[..8].copy_from_slice(&number.to_le_bytes());
        }
        to.publish_batch(self.batch[..count].iter().map(Vec::as_slice)).map(drop)
    }

    #[inline]
    fn read(&mut self, payload: &[u8]) -> Option<u64> {
        let (number, rest) = payload.split_first_chunk::<8>()?;
        if self.whole {
            black_box(sum(rest));
        }
        (payload.len() == self.batch[0].len()).then_some(u64::from_le_bytes(*number))
    }
}

/// Reads every byte, eight at a time, in a loop that the compiler turns into vector loads.
fn sum(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<8>();
    let words = words.iter().fold(0u64, |sum, word| sum.wrapping_add(u64::from_le_bytes(*word)));
    rest.iter().fold(words, |sum, byte| sum.wrapping_add(u64::from(*byte)))
}
