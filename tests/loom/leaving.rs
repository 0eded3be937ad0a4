//! A vCPU that was moved leaves its VM from its new CPU at the very moment when the old one hands it on: whoever takes the VM
//! apart has the only reference to it by then. Reference and count are the shipped order; the queues are modelled.

use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use loom::sync::{Arc, Mutex};
use loom::thread;

use crate::check;

/// How the old CPU hands the reference on.
#[derive(Clone, Copy, PartialEq)]
enum HandOver {
    /// It moves to the new CPU's queue.
    Moved,
    /// A copy does, and its own goes later.
    Copied,
}

/// What the VM counts and says, apart from the reference that is watched.
struct World {
    stopping: AtomicBool,
    held: AtomicUsize,
    /// The new CPU's queue.
    queue: Mutex<Option<Arc<()>>>,
}

impl World {
    /// The reference goes first, then the count.
    fn release(&self, vm: Arc<()>) {
        drop(vm);
        self.held.fetch_sub(1, Ordering::AcqRel);
    }

    fn hand_on(&self, vm: Arc<()>, how: HandOver) {
        if self.stopping.load(Ordering::SeqCst) {
            return self.release(vm);
        }
        let own = (how == HandOver::Copied).then(|| Arc::clone(&vm));
        *self.queue.lock().unwrap() = Some(vm);
        drop(own);
    }

    /// The new CPU looks at its queue, as it does after each kick.
    fn let_go(&self) {
        let mut queue = self.queue.lock().unwrap();
        if self.stopping.load(Ordering::SeqCst)
            && let Some(vm) = queue.take()
        {
            drop(queue);
            self.release(vm);
        }
    }
}

fn moved_and_destroyed(how: HandOver) {
    check(move || {
        let world = Arc::new(World {
            stopping: AtomicBool::new(false),
            held: AtomicUsize::new(1),
            queue: Mutex::new(None),
        });
        let mut vm = Arc::new(());
        let old = {
            let (world, vm) = (Arc::clone(&world), Arc::clone(&vm));
            thread::spawn(move || world.hand_on(vm, how))
        };
        let new = {
            let world = Arc::clone(&world);
            thread::spawn(move || world.let_go())
        };
        world.stopping.store(true, Ordering::SeqCst);
        if world.held.load(Ordering::Acquire) == 0 {
            assert!(Arc::get_mut(&mut vm).is_some(), "somebody refers to it");
        }
        old.join().unwrap();
        new.join().unwrap();
        world.let_go();
        assert_eq!(world.held.load(Ordering::Acquire), 0);
        assert!(Arc::get_mut(&mut vm).is_some());
    });
}

#[test]
fn good_a_reference_that_is_handed_on_is_not_kept() {
    moved_and_destroyed(HandOver::Moved);
}

#[test]
#[should_panic = "somebody refers to it"]
fn bad_a_reference_kept_beside_the_one_handed_on_outlives_the_count() {
    moved_and_destroyed(HandOver::Copied);
}
