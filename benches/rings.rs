//! One thread's cost of publishing and receiving: no cache line moves, so these are the instructions alone.
//! Figures between processes, beside the bare hardware, come from `shmbus bench`.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use shmbus::{Channel, Topic};

fn channel(c: &mut Criterion) {
    let mut group = c.benchmark_group("channel, publish and receive");
    group.throughput(Throughput::Elements(1));
    group.bench_function("8 B", |b| {
        let channel = Channel::create(Topic::<u64>::new("bench").messages(1024)).expect("memory");
        let mut publisher = channel.publisher().expect("first");
        let mut subscriber = channel.subscriber().expect("first");
        b.iter(|| {
            publisher.publish(black_box(&7)).expect("room");
            black_box(*subscriber.recv().expect("a message"));
        });
    });
    group.bench_function("56 B", |b| {
        let channel = Channel::create(Topic::<[u64; 7]>::new("bench").messages(1024)).expect("memory");
        let mut publisher = channel.publisher().expect("first");
        let mut subscriber = channel.subscriber().expect("first");
        b.iter(|| {
            publisher.publish(black_box(&[7; 7])).expect("room");
            black_box(subscriber.recv().expect("a message")[6]);
        });
    });
    group.bench_function("64 KiB, copied in", |b| {
        let channel = Channel::create(Topic::<[u8]>::new("bench").messages(16)).expect("memory");
        let mut publisher = channel.publisher().expect("first");
        let mut subscriber = channel.subscriber().expect("first");
        let payload = vec![7; 64 << 10];
        b.iter(|| {
            publisher.publish(black_box(&payload)).expect("room");
            black_box(subscriber.recv().expect("a message")[6]);
        });
    });
    group.finish();
}

criterion_group!(benches, channel);
criterion_main!(benches);
