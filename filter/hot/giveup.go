package hot

// GiveUp ends a round without a word about syncs: they could not be made, and none has
// failed. Nothing is cleared.
func (m *Map) GiveUp(r Round) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.cooling || r.m != m || r.seq != m.round {
		return ErrRound
	}
	m.cooling = false
	return nil
}
