//! The slots of a lane, and how many of them attempts take.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The slots of one lane: as many deliveries of it are in hand at a time, at most.
#[derive(Debug)]
pub struct Slots {
    free: Arc<Semaphore>,
    usage: Arc<Usage>,
}

/// One delivery's slot, given back when it is dropped.
#[derive(Debug)]
pub struct Slot {
    _permit: OwnedSemaphorePermit,
    usage: Arc<Usage>,
}

/// What attempts take of a lane. A slot may also be held by a delivery that is only looked at, or is waiting for a
/// request, so that the free ones do not tell it.
#[derive(Debug)]
pub(crate) struct Usage {
    all: usize,
    taken: AtomicUsize,
}

impl Slots {
    /// So many, all of them free.
    pub fn new(all: usize) -> Self {
        let usage = Arc::new(Usage { all, taken: AtomicUsize::new(0) });
        Self { free: Arc::new(Semaphore::new(all)), usage }
    }

    /// Waits for a free one.
    pub async fn acquire(&self) -> Slot {
        let permit = Arc::clone(&self.free).acquire_owned().await;
        self.slot(permit.expect("it is never closed"))
    }

    /// A free one, if there is one.
    pub fn try_acquire(&self) -> Option<Slot> {
        Arc::clone(&self.free).try_acquire_owned().ok().map(|permit| self.slot(permit))
    }

    fn slot(&self, permit: OwnedSemaphorePermit) -> Slot {
        Slot { _permit: permit, usage: Arc::clone(&self.usage) }
    }
}

impl Slot {
    pub(crate) fn usage(&self) -> &Arc<Usage> {
        &self.usage
    }
}

impl Usage {
    /// Whether a connection that holds `held` slots may take so many more: no more than it holds are free then (Choudhury
    /// and Hahne's dynamic threshold with α = 1). So one alone gets half of the lane, and n of them that take theirs in turns
    /// leave 1/(n+1) of it to others; each that comes after another has taken all it may gets half of what is left.
    /// One that holds none always may.
    pub(crate) fn has_room(&self, held: usize, more: usize) -> bool {
        held <= self.all.saturating_sub(self.taken.load(Ordering::Relaxed)).saturating_sub(more)
    }

    pub(crate) fn take(&self, slots: usize) {
        self.taken.fetch_add(slots, Ordering::Relaxed);
    }

    pub(crate) fn give_back(&self, slots: usize) {
        self.taken.fetch_sub(slots, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn i7_so_many_who_take_all_they_can_leave_room_for_one_more(all in 1_usize..600, hogs in 1_usize..40) {
            let slots = Slots::new(all);
            let mut held = vec![0_usize; hogs];
            // In turns, until nobody may take another one, or none is left.
            loop {
                let before = held.clone();
                for own in &mut held {
                    let taken = slots.usage.taken.load(Ordering::Relaxed);
                    if taken < all && slots.usage.has_room(*own, 1) {
                        slots.usage.take(1);
                        *own += 1;
                    }
                }
                if held == before {
                    break;
                }
            }
            let free = all - held.iter().sum::<usize>();
            prop_assert!(free >= all / (hogs + 1), "{free} of {all}");
            let (least, most) = (held.iter().min().unwrap(), held.iter().max().unwrap());
            prop_assert!(most - least <= 1, "{held:?}");
        }
    }

    #[test]
    fn one_that_holds_nothing_always_may() {
        let slots = Slots::new(8);
        slots.usage.take(3);
        assert!(slots.usage.has_room(0, 5), "a batch of all that is left");
        assert!(!slots.usage.has_room(1, 5));
        slots.usage.give_back(3);
        assert!(slots.usage.has_room(1, 5));
    }
}
