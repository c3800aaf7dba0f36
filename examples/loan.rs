//! Zero copy: an image is drawn in shared memory and read where it lies.

use shmbus::{Bus, Topic};

const FRAMES: Topic<[u8]> = Topic::new("example.frames").exclusive().messages(8).bytes(64 << 20);
const FRAME_BYTES: usize = 1920 * 1080 * 4;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let bus = Bus::open_default()?;
    let mut camera = bus.publisher(FRAMES)?;
    let mut screen = bus.subscriber(FRAMES).open()?;

    let mut frame = camera.loan_bytes(FRAME_BYTES)?;
    frame.fill(0x7f);
    frame.publish()?;

    let shown = screen.recv()?;
    println!("a frame of {} bytes, first byte {:#x}, never copied", shown.len(), shown[0]);
    drop((camera, screen));
    bus.remove_topic(FRAMES.name(), false)?;
    Ok(())
}
