//! The channel: order, wholeness, laps, and what the dead leave behind.
#![cfg(loom)]

use std::sync::Arc;

use loom::thread;
use loom_tests::*;
use shmbus::model::*;

/// Sends `values` one at a time, with their borrowed part.
fn send_all(sender: &mut Sender<1>, borrowed: &Borrowed, values: impl IntoIterator<Item = u64>) {
    for value in values {
        until(|| sender.has_room(1).then_some(()));
        borrowed.write(sender.next(), value);
        assert!(sender.send_word(value));
    }
}

/// Receives `count` values in order, the borrowed part with each.
fn receive_all(receiver: &mut Receiver<1>, borrowed: &Borrowed, count: usize) -> Vec<u64> {
    let mut received = Vec::new();
    while received.len() < count {
        let value = until(|| receiver.peek_word());
        assert_eq!(borrowed.read(receiver.next()), value, "the borrowed part of position {}", receiver.next());
        receiver.step();
        receiver.free();
        received.push(value);
    }
    received
}

#[test]
fn two_laps_arrive_in_order_and_whole() {
    explore(PREEMPTIONS_SMALL, || {
        let (channel, borrowed) = (channel(2), Arc::new(Borrowed::new(2)));
        let (theirs, written) = (channel.clone(), borrowed.clone());
        let sending = thread::spawn(move || send_all(&mut Sender::new(theirs, 0), &written, 1..=5));
        let received = receive_all(&mut Receiver::new(channel, 0), &borrowed, 5);
        assert_eq!(received, [1, 2, 3, 4, 5]);
        sending.join().unwrap();
    });
}

/// The receiver frees one position after the other; has_room(2) looks at the last only.
#[test]
fn a_batch_waits_for_the_reads_of_all_its_slots() {
    explore(PREEMPTIONS_SMALL, || {
        let (channel, borrowed) = (channel(2), Arc::new(Borrowed::new(2)));
        let (theirs, written) = (channel.clone(), borrowed.clone());
        let sending = thread::spawn(move || {
            let mut sender = Sender::new(theirs, 0);
            for batch in [[1, 2], [3, 4]] {
                until(|| sender.has_room(2).then_some(()));
                (written.write(sender.next(), batch[0]), written.write(sender.next() + 1, batch[1]));
                sender.send_words_down_to(0, &batch);
                sender.advance(2);
            }
        });
        let mut receiver = Receiver::new(channel, 0);
        let first = receive_all(&mut receiver, &borrowed, 3);
        assert_eq!(receiver.peek_word(), Some(4), "who sees the first of a batch sees all of it");
        assert_eq!((first, receive_all(&mut receiver, &borrowed, 1)), (vec![1, 2, 3], vec![4]));
        sending.join().unwrap();
    });
}

#[test]
fn a_sender_that_dies_before_its_commit_leaves_nothing() {
    explore(PREEMPTIONS, || {
        let (channel, borrowed) = (channel(2), Arc::new(Borrowed::new(2)));
        let (theirs, written) = (channel.clone(), borrowed.clone());
        let sending = thread::spawn(move || {
            let mut dies = Sender::new(theirs.clone(), 0);
            send_all(&mut dies, &written, [1, 2]);
            until(|| dies.has_room(1).then_some(()));
            dies.send_words_down_to(1, &[666]);
            drop(dies);
            send_all(&mut successor(&theirs), &written, [3, 4]);
        });
        let received = receive_all(&mut Receiver::new(channel, 0), &borrowed, 4);
        assert_eq!(received, [1, 2, 3, 4]);
        sending.join().unwrap();
    });
}

#[test]
fn a_sender_that_dies_in_a_batch_leaves_nothing() {
    explore(PREEMPTIONS, || {
        let (channel, borrowed) = (channel(2), Arc::new(Borrowed::new(2)));
        let (theirs, written) = (channel.clone(), borrowed.clone());
        let sending = thread::spawn(move || {
            let mut dies = Sender::new(theirs.clone(), 0);
            send_all(&mut dies, &written, [1]);
            until(|| dies.has_room(2).then_some(()));
            dies.send_words_down_to(1, &[666, 667]);
            drop(dies);
            send_all(&mut successor(&theirs), &written, [2, 3]);
        });
        let received = receive_all(&mut Receiver::new(channel, 0), &borrowed, 3);
        assert_eq!(received, [1, 2, 3]);
        sending.join().unwrap();
    });
}

/// The receiver goes on freeing while the coordinator looks for the tail of a full ring.
#[test]
fn a_full_ring_is_resumed_while_it_is_emptied() {
    explore(PREEMPTIONS_SMALL, || {
        let (channel, borrowed) = (channel(4), Arc::new(Borrowed::new(4)));
        let (theirs, written) = (channel.clone(), borrowed.clone());
        send_all(&mut Sender::new(theirs.clone(), 0), &written, [1, 2, 3, 4]);
        let sending = thread::spawn(move || {
            assert_eq!(theirs.ends().1, 4, "nobody sends, so the tail stands still");
            send_all(&mut successor(&theirs), &written, [5]);
        });
        let received = receive_all(&mut Receiver::new(channel, 0), &borrowed, 5);
        assert_eq!(received, [1, 2, 3, 4, 5]);
        sending.join().unwrap();
    });
}

/// A message whose receiver died before freeing it is received again.
#[test]
fn a_receiver_that_dies_unfreed_loses_nothing() {
    explore(PREEMPTIONS, || {
        let (channel, borrowed) = (channel(2), Arc::new(Borrowed::new(2)));
        let (theirs, written) = (channel.clone(), borrowed.clone());
        let sending = thread::spawn(move || send_all(&mut Sender::new(theirs, 0), &written, 1..=4));
        let mut dies = Receiver::new(channel.clone(), 0);
        receive_all(&mut dies, &borrowed, 1);
        until(|| dies.peek_word());
        dies.step();
        drop(dies);
        let (head, _) = channel.ends();
        assert_eq!(receive_all(&mut Receiver::new(channel, head), &borrowed, 3), [2, 3, 4]);
        sending.join().unwrap();
    });
}

#[test]
fn who_sees_the_sender_gone_sees_its_last_message() {
    explore(PREEMPTIONS_SMALL, || {
        let channel = channel(2);
        let theirs = channel.clone();
        let sending = thread::spawn(move || {
            // Not `send_word`: its look at the doorbell has a fence.
            Sender::new(theirs.clone(), 0).send_words_down_to(0, &[1]);
            theirs.header.close(End::Sender);
        });
        let mut receiver = Receiver::new(channel.clone(), 0);
        if channel.header.is_closed(End::Sender) {
            assert_eq!(receiver.recv_word(), Some(1));
        }
        sending.join().unwrap();
    });
}

/// The sender reuses arena space of a message that the receiver has freed.
#[test]
fn a_freed_message_is_no_longer_read() {
    explore(PREEMPTIONS_SMALL, || {
        let (channel, borrowed) = (channel(2), Arc::new(Borrowed::new(1)));
        borrowed.write(0, 1);
        Sender::new(channel.clone(), 0).send_words_down_to(0, &[1]);
        let (theirs, written) = (channel.clone(), borrowed.clone());
        let sending = thread::spawn(move || {
            if theirs.is_freed(0) {
                written.write(0, 2);
            }
        });
        assert_eq!(receive_all(&mut Receiver::new(channel, 0), &borrowed, 1), [1]);
        sending.join().unwrap();
    });
}

/// What the coordinator does when a sender has died.
fn successor(channel: &Channel<1>) -> Sender<1> {
    let (_, tail) = channel.ends();
    channel.clear_above(tail);
    Sender::new(channel.clone(), tail)
}
