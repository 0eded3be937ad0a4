//! A spinning mutex: `spin`'s when it ships, loom's when it is model-checked, behind one method.
//!
//! For short sections off the hot paths. Nothing is allocated and no device is touched while one is held.

/// Mutual exclusion by spinning.
#[derive(Debug, Default)]
pub struct Mutex<T>(Inner<T>);

#[cfg(not(loom))]
type Inner<T> = spin::Mutex<T>;
#[cfg(loom)]
type Inner<T> = loom::sync::Mutex<T>;

/// Holds a [`Mutex`] until it is dropped.
#[cfg(not(loom))]
pub type Guard<'a, T> = spin::MutexGuard<'a, T>;
/// Holds a [`Mutex`] until it is dropped.
#[cfg(loom)]
pub type Guard<'a, T> = loom::sync::MutexGuard<'a, T>;

impl<T> Mutex<T> {
    /// A free mutex around `value`.
    pub fn new(value: T) -> Self {
        Self(Inner::new(value))
    }

    /// Waits for the mutex and holds it until the guard is dropped.
    #[cfg(not(loom))]
    pub fn lock(&self) -> Guard<'_, T> {
        self.0.lock()
    }

    /// Waits for the mutex and holds it until the guard is dropped.
    #[cfg(loom)]
    pub fn lock(&self) -> Guard<'_, T> {
        match self.0.lock() {
            Ok(guard) => guard,
            Err(poisoned) => poisoned.into_inner(),
        }
    }
}
